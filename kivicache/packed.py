"""[`PackedTokens`]: tokens kept as packed codes with a scale and a minimum per group."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kivicache.backends import get_backend
from kivicache.buffer import TokenBuffer
from kivicache.packing import unpack, words_per_token
from kivicache.quantization import METADATA_DTYPE, dequantize
from kivicache.rotation import hadamard, rotation_block
from kivicache.triton import on_device, serves

# What is quantized or dequantized at once, in bytes of float32, and in tokens at least: bounds the temporaries,
# however long the cache is. A kernel needs none unless it rotates, and takes all tokens in one launch.
CHUNK_NBYTES, CHUNK_LENGTH = 2**24, 32


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
        at_once = self.rotation is None and self.backend.has_kernel(states.device)
        for start, stop in self._chunks(0, states.shape[2], at_once):
            part = states[:, :, start:stop].detach()
            if self.rotation is not None:
                part = _rotated(part)
            groups = (stop - start) // self.tokens_per_group
            room = self.codes.room(stop - start), self.scale.room(groups), self.minimum.room(groups)
            self.backend.quantize_pack(part, self.nbits, self.group_size, self.axis, room)
            self.codes.advance(stop - start)
            self.scale.advance(groups)
            self.minimum.advance(groups)

    def copy_to(self, out: Tensor, start: int, stop: int) -> None:
        """Write tokens ``start`` to ``stop``, dequantized, into ``out``; ``start`` a multiple of tokens_per_group."""
        for first, last in self._chunks(start, stop, at_once=self.rotation is None and serves(out.device)):
            part = out[:, :, first - start : last - start]
            if self.rotation is None:
                self._dequantize(part, first, last)
            else:
                states = torch.empty(part.shape, dtype=torch.float32, device=out.device)
                self._dequantize(states, first, last)
                part.copy_(_rotated(states))

    def _dequantize(self, out: Tensor, start: int, stop: int) -> None:
        """Write ``codes * scale + minimum`` of the tokens into ``out``, computed in float32 and rounded once."""
        first, last = start // self.tokens_per_group, -(-stop // self.tokens_per_group)
        scale, minimum = self.scale.read(first, last), self.minimum.read(first, last)
        if serves(out.device):
            from kivicache.triton.unpack import unpack_dequantize  # triton is optional

            with on_device(out):
                words = self.codes.read(start, stop)
                return unpack_dequantize(words, scale, minimum, self.nbits, self.group_size, self.axis, out)
        codes = unpack(self.codes.read(start, last * self.tokens_per_group), self.nbits, self.head_dim)
        out.copy_(dequantize(codes, scale, minimum, self.group_size, self.axis)[:, :, : stop - start])

    def _chunks(self, start: int, stop: int, at_once: bool) -> Iterator[tuple[int, int]]:
        """The tokens in parts of ``CHUNK_NBYTES`` in float32, in whole groups, or in one."""
        batch, heads = self.codes.data.shape[:2]
        token_nbytes = max(4 * batch * heads * self.head_dim, 1)
        length = max(CHUNK_NBYTES // token_nbytes, CHUNK_LENGTH, self.tokens_per_group)
        length -= length % self.tokens_per_group
        for first in range(start, stop, max(stop - start, 1) if at_once else length):
            yield first, stop if at_once else min(first + length, stop)

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
