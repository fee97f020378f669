"""KIVI's own min-max quantization: in torch, and on a GPU as one kernel with the very same result."""

from __future__ import annotations

from torch import Tensor

from kivicache.backends.base import Backend
from kivicache.quantization import quantize
from kivicache.triton import on_device, serves


class NativeBackend(Backend, name="native"):
    """The paper's arithmetic, see [`kivicache.quantization`]."""

    def quantize(self, states: Tensor, nbits: int, group_size: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
        return quantize(states, nbits, group_size, axis)

    def quantize_pack(self, states: Tensor, nbits: int, group_size: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
        if not serves(states.device):
            return super().quantize_pack(states, nbits, group_size, axis)
        from kivicache.triton.pack import quantize_pack  # triton is optional

        with on_device(states):
            return quantize_pack(states, nbits, group_size, axis)
