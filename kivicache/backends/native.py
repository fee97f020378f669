"""KIVI's own min-max quantization."""

from __future__ import annotations

from torch import Tensor

from kivicache.backends.base import Backend
from kivicache.quantization import quantize


class NativeBackend(Backend, name="native"):
    """The paper's arithmetic, see [`kivicache.quantization`]."""

    def quantize(self, states: Tensor, nbits: int, group_size: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
        return quantize(states, nbits, group_size, axis)
