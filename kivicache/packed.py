"""[`PackedTokens`]: tokens kept as packed codes with a scale and a minimum per group."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kivicache.backends import get_backend
from kivicache.buffer import TokenBuffer
from kivicache.packing import unpack, words_per_token
from kivicache.quantization import METADATA_DTYPE, dequantize
from kivicache.rotation import hadamard, rotation_block
from kivicache.triton import on_device, serves


class PackedTokens:
    """Keys or values of some heads in ``nbits`` bits, with the interface of a [`TokenBuffer`].

    ``codes`` holds int16 words ``[batch, heads, tokens, words]`` (see [`kivicache.packing`]); ``scale`` and
    ``minimum`` hold float16 ``[batch, heads, groups, head_dim]`` where groups run along a channel, or
    ``[batch, heads, tokens, groups]`` where they run along a token. Tokens are only ever added; what is stored is
    never quantized again.
    """

    def __init__(self, like: Tensor, nbits: int, group_size: int, axis: str, rotation: str | None, backend: str):
        """An empty store for states shaped like ``like`` ``[batch, heads, tokens, head_dim]``."""
        self.head_dim, self.dtype = like.shape[3], like.dtype
        self.nbits, self.axis, self.rotation = nbits, axis, rotation
        self.group_size = self.head_dim if group_size == -1 else group_size
        self.backend = get_backend(backend)
        if rotation is not None:
            rotation_block(self.head_dim)  # refuses a head_dim that cannot turn
        groups_width = self.head_dim if axis == "channel" else -(-self.head_dim // self.group_size)
        self.codes = TokenBuffer(like, words_per_token(self.head_dim, nbits), torch.int16)
        self.scale = TokenBuffer(like, groups_width, METADATA_DTYPE)
        self.minimum = TokenBuffer(like, groups_width, METADATA_DTYPE)

    def __len__(self) -> int:
        return self.codes.stop - self.codes.start

    @property
    def tokens_per_group(self) -> int:
        """How many tokens one scale covers: tokens come and go in multiples of it."""
        return self.group_size if self.axis == "channel" else 1

    def append(self, states: Tensor) -> None:
        """Quantize ``[batch, heads, tokens, head_dim]`` and add them; ``tokens`` in multiples of tokens_per_group."""
        if self.rotation is not None:
            states = _rotated(states)
        words, scale, minimum = self.backend.quantize_pack(states, self.nbits, self.group_size, self.axis)
        self.codes.append(words)
        self.scale.append(scale)
        self.minimum.append(minimum)

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop`` dequantized; ``start`` a multiple of tokens_per_group."""
        first, last = start // self.tokens_per_group, -(-stop // self.tokens_per_group)
        words = self.codes.read(start, last * self.tokens_per_group)
        states = self._dequantize(words, self.scale.read(first, last), self.minimum.read(first, last))
        if self.rotation is not None:
            states = _rotated(states)
        return states[:, :, : stop - start].to(self.dtype)

    def _dequantize(self, words: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        """``[batch, heads, tokens, head_dim]`` in float32."""
        if not serves(words.device):
            return dequantize(unpack(words, self.nbits, self.head_dim), scale, minimum, self.group_size, self.axis)
        from kivicache.triton.unpack import unpack_dequantize  # triton is optional

        with on_device(words):
            return unpack_dequantize(words, scale, minimum, self.nbits, self.group_size, self.axis, self.head_dim)

    def snapshot(self) -> PackedTokens:
        """The tokens as they are now, see [`TokenBuffer.snapshot`]."""
        taken = PackedTokens.__new__(PackedTokens)
        taken.__dict__.update(self.__dict__)
        taken.codes, taken.scale, taken.minimum = (buffer.snapshot() for buffer in self.buffers)
        return taken

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` more."""
        self.codes.reserve(tokens)
        self.scale.reserve(tokens // self.tokens_per_group)
        self.minimum.reserve(tokens // self.tokens_per_group)

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens, a multiple of tokens_per_group."""
        self.codes.truncate(length)
        self.scale.truncate(length // self.tokens_per_group)
        self.minimum.truncate(length // self.tokens_per_group)

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        for buffer in self.buffers:
            buffer.map_batch(select)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> None:
        for buffer in self.buffers:
            buffer.to(device, non_blocking)

    @property
    def buffers(self) -> tuple[TokenBuffer, TokenBuffer, TokenBuffer]:
        return self.codes, self.scale, self.minimum


def _rotated(states: Tensor) -> Tensor:
    """The Hadamard rotation of ``states`` ``[..., head_dim]``, in float32."""
    if not serves(states.device):
        return hadamard(states.float())
    from kivicache.triton.rotate import rotate  # triton is optional

    with on_device(states):
        return rotate(states.contiguous(), torch.float32)
