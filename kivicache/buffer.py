"""[`TokenBuffer`]: tokens in order, added at the end without moving those that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# A buffer that must grow takes this fraction of its new length as room for more: 1/16 wasted at the most, and a token
# is copied 16 times over the whole growth of a buffer however long it gets.
GROWTH = 16
# Capacities are multiples of this many tokens, so that the rows of every head start on the 16 bytes that kernels load.
ALIGNMENT = 8


class TokenBuffer:
    """A tensor ``[batch, heads, tokens, width]`` that grows, shrinks and slides along its tokens.

    ``data`` is ``[batch, heads, capacity, width]``; the tokens are ``data[:, :, start:stop]``. Adding tokens writes
    behind ``stop`` and never over existing ones, so what [`read`] gave earlier keeps its content: when the room runs
    out, the tokens move to a new allocation and the old one lives on with its views.

    No gradient passes through a buffer, and its memory is an ordinary tensor also when it is allocated under
    ``torch.inference_mode``: a cache filled there must stay writable outside.
    """

    def __init__(self, like: Tensor, width: int | None = None, dtype: torch.dtype | None = None):
        """An empty buffer with the batch, heads, device, and unless given width and dtype, of ``like``."""
        shape = (like.shape[0], like.shape[1], 0, width or like.shape[3])
        with ordinary_tensors():
            self._hold(torch.empty(shape, dtype=dtype or like.dtype, device=like.device))
        self.start = self.stop = 0

    @classmethod
    def of(cls, data: Tensor, length: int | None = None) -> TokenBuffer:
        """A buffer that holds the first ``length`` tokens of ``data``, default all, and does not copy them."""
        buffer = cls.__new__(cls)
        buffer._hold(data)
        buffer.start, buffer.stop = 0, data.shape[2] if length is None else length
        return buffer

    def _hold(self, data: Tensor) -> None:
        """Take ``data``, and note what a launch asks of it at every decode step."""
        self.data = data
        by_batch, by_head, by_token, by_channel = data.stride()
        self.strides = by_batch, by_head
        self.row_bytes = by_token * data.element_size()
        contiguous = by_channel == 1 and by_token == data.shape[3]
        self._aligned = contiguous and (data.data_ptr() | by_batch | by_head) % 16 == 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A deep copy, in this process or another: its tensor lies elsewhere, and may come from inference mode."""
        self.__dict__.update(state)
        self._hold(as_ordinary(self.data))

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def aligned(self) -> bool:
        """Whether a token's row is contiguous, the first one starts on 16 bytes, and strides are multiples of 16."""
        return self._aligned and self.start * self.row_bytes % 16 == 0

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Tokens ``start`` to ``stop``, as a view: ``[batch, heads, stop - start, width]``."""
        stop = len(self) if stop is None else stop
        return self.data[:, :, self.start + start : self.start + stop]

    def snapshot(self) -> TokenBuffer:
        """The tokens as they are now, without a copy: valid until tokens are cut off the end and others added."""
        taken = TokenBuffer.__new__(TokenBuffer)
        taken.__dict__.update(self.__dict__)
        return taken

    def data_ptr(self) -> int:
        """The address of the first token, as ``Tensor.data_ptr`` of what [`read`] gives."""
        return self.data.data_ptr() + self.start * self.row_bytes

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` more."""
        if self.stop + tokens > self.data.shape[2]:
            self._reallocate(len(self) + tokens)

    def append(self, states: Tensor) -> None:
        """Add tokens ``[batch, heads, tokens, width]`` at the end."""
        if states.shape[2]:
            self.room(states.shape[2]).copy_(states.detach())
            self.advance(states.shape[2])

    def room(self, tokens: int) -> Tensor:
        """Where the next ``tokens`` belong, to be written to: they are there once [`advance`] says so."""
        self.reserve(tokens)
        return self.data[:, :, self.stop : self.stop + tokens]

    def advance(self, tokens: int) -> None:
        """Take in ``tokens`` that were written into [`room`]."""
        self.stop += tokens

    def copy_to(self, out: Tensor, start: int, stop: int) -> None:
        """Write tokens ``start`` to ``stop`` into ``out``."""
        out.copy_(self.read(start, stop))

    def pop(self, tokens: int) -> Tensor:
        """Take up to ``tokens`` of the oldest tokens out and return them."""
        oldest = self.read(0, min(tokens, len(self)))
        self.start += oldest.shape[2]
        if self.data.shape[2] - len(self) > len(self) // GROWTH + ALIGNMENT:
            self._reallocate(len(self))
        return oldest

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self.stop = min(self.stop, self.start + length)

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        """Replace the content by ``select`` of it, which may change the batch dimension alone."""
        with ordinary_tensors():
            self._hold(select(self.data).contiguous())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> None:
        with ordinary_tensors():
            self._hold(self.data.to(device, non_blocking=non_blocking))

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held."""
        return self.read().nbytes

    @property
    def allocated_nbytes(self) -> int:
        """Bytes allocated, the room for more tokens included."""
        return self.data.nbytes

    def _reallocate(self, length: int) -> None:
        batch, heads, _, width = self.data.shape
        capacity = -(-(length + length // GROWTH) // ALIGNMENT) * ALIGNMENT
        with ordinary_tensors():
            data = self.data.new_empty(batch, heads, capacity, width)
            data[:, :, : len(self)] = self.read()
        self.start, self.stop = 0, len(self)
        self._hold(data)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """What is made here can be written to also outside of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def as_ordinary(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy of it where only inference mode could write to it."""
    with ordinary_tensors():
        return tensor.clone() if tensor.is_inference() else tensor
