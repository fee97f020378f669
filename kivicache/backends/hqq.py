"""Half-Quadratic Quantization (https://github.com/mobiusml/hqq, https://mobiusml.github.io/hqq_blog/)."""

from __future__ import annotations

import torch
from torch import Tensor

from kivicache.backends.base import LibraryBackend, import_library
from kivicache.quantization import METADATA_DTYPE


class HQQBackend(LibraryBackend, name="hqq"):
    """Starts at minimum and maximum, then moves each group's zero to lessen ``|error|**0.7``, so outliers count less.

    What its users should know of hqq, which is called as it is:

    - All groups of a call stop together, when their mean error no longer falls. So the codes of a token depend a
      little on which tokens were quantized with it, and by which chunks a prompt came in.
    - No step is finer than 5e-5, and a group that spans less than 1e-4 counts as constant.
    - On a GPU it solves in float16, waits for the GPU at each of its up to 20 rounds and empties PyTorch's
      allocator cache at each call: choose "native" where speed counts.
    """

    def __init__(self) -> None:
        self._quantizer = import_library("hqq.core.quantize", "hqq", "Quantizer").Quantizer

    def fit(self, rows: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
        # hqq reads back (c - zero) * scale. Its zero counts steps from 0, which overflows float16 for a narrow group
        # far from 0; from the group's minimum it is the same problem with a small zero.
        low = rows.amin(dim=1, keepdim=True)
        offsets = (rows - low).clamp_(max=torch.finfo(METADATA_DTYPE).max)
        _, meta = self._quantizer.quantize(
            offsets, nbits=nbits, group_size=rows.shape[1], axis=1, bitpack=False, device=rows.device
        )
        scale = meta["scale"].float()
        return scale, low - meta["zero"].float() * scale
