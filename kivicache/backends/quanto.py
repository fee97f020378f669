"""optimum-quanto's affine quantization (https://github.com/huggingface/optimum-quanto)."""

from __future__ import annotations

from torch import Tensor

from kivicache.backends.base import LibraryBackend, import_library


class QuantoBackend(LibraryBackend, name="quanto"):
    """quanto's ``MaxOptimizer``, which transformers' own quanto cache uses too.

    It is min-max, as KIVI is. quanto stores affine codes of 2 and 4 bits only, its 8-bit tensors being symmetric; its
    arithmetic has no such limit and the storage is ours, so here 8 bits are affine as well.
    """

    def __init__(self) -> None:
        quanto = import_library("optimum.quanto", "quanto", "MaxOptimizer", "qtypes")
        self._optimizer, self._qtypes = quanto.MaxOptimizer(), quanto.qtypes

    def fit(self, rows: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
        # Not by calling the optimizer: that takes a single row for a tensor without groups, one scale per value.
        scale, shift = self._optimizer.optimize(rows, self._qtypes[f"qint{nbits}"], axis=0)
        return scale, -shift  # quanto reads back c * scale - shift
