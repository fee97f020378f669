"""[`KIVIStates`]: the keys, or the values, of one layer: sinks | packed tokens | residual."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kivicache.buffer import TokenBuffer
from kivicache.config import LayerConfig
from kivicache.memory import MemoryReport
from kivicache.packed import PackedTokens


def heads_by_nbits(nbits: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Bits -> the heads that have so many, in the order of the stores, from the bits of each head."""
    return {bits: tuple(h for h, of_head in enumerate(nbits) if of_head == bits) for bits in sorted(set(nbits))}


class KIVIStates:
    """Keys or values of one layer in order of tokens: the first ones exact, then packed ones, the newest exact.

    Heads of different bits lie in stores of their own: ``packed`` lists (heads, store), where ``heads`` indexes the
    head dimension. A store of 16-bit heads is a plain [`TokenBuffer`].
    """

    def __init__(self, like: Tensor, nbits: Sequence[int], axis: str, config: LayerConfig):
        """Empty states.

        Args:
            like: ``[batch, kv_heads, tokens, head_dim]`` whose shape (but for the tokens), dtype and device are kept.
            nbits: 2, 4, 8 or 16 for each kv head.
            axis: what a group runs along, "channel" or "token".
            config: group size, sinks, rotation and backend of the layer.
        """
        self.sink_length = config.sink_length
        self.axis, self.rotation = axis, config.rotation
        self.sinks = TokenBuffer(like)
        self.residual = TokenBuffer(like)
        self.packed: list[tuple[list[int] | slice, TokenBuffer | PackedTokens]] = []
        heads_of_stores = heads_by_nbits(nbits)
        self.heads = tuple(heads_of_stores.values())
        like = like[:, :, :0]  # a selection of heads is a copy
        for bits, members in heads_of_stores.items():
            heads = slice(None) if len(members) == len(nbits) else list(members)
            if bits == 16:
                store: TokenBuffer | PackedTokens = TokenBuffer(like[:, heads])
            else:
                store = PackedTokens(like[:, heads], bits, config.group_size, axis, config.rotation, config.backend)
            self.packed.append((heads, store))
        self.tokens_per_group = config.group_size if axis == "channel" else 1

    def __len__(self) -> int:
        sinks, residual = self.sinks, self.residual  # not by their len(): it is asked for at every step
        return sinks.stop - sinks.start + len(self.packed[0][1]) + residual.stop - residual.start

    @property
    def packed_length(self) -> int:
        return len(self.packed[0][1])

    def append(self, states: Tensor, packed_length: int) -> None:
        """Add tokens, and pack the oldest exact ones until ``packed_length`` are packed.

        Args:
            states: ``[batch, kv_heads, tokens, head_dim]``.
            packed_length: from [`kivicache.policy.packed_lengths`]; fewer than there are changes nothing.
        """
        sinks = min(self.sink_length - len(self.sinks), states.shape[2])
        self.sinks.append(states[:, :, :sinks])
        states = states[:, :, sinks:]
        missing = max(packed_length - self.packed_length, 0)
        for _, store in self.packed:
            store.reserve(missing)
        if missing:
            old = self.residual.pop(missing)
            # New tokens that complete the last group of the old ones; the others are packed where they are, a long
            # prompt is never copied.
            filling = -old.shape[2] % self.tokens_per_group
            new = missing - old.shape[2]
            self._pack(torch.cat([old, states[:, :, :filling]], dim=2) if filling else old)
            self._pack(states[:, :, filling:new])
            states = states[:, :, new:]
        self.residual.append(states)

    def _pack(self, states: Tensor) -> None:
        if states.shape[2]:
            for heads, store in self.packed:
                store.append(states[:, heads])

    def packing(self, packed_length: int) -> KIVIStates:
        """The same tokens, the oldest exact ones packed until ``packed_length`` are: a snapshot where some must be."""
        if packed_length <= self.packed_length:
            return self
        packed = self.snapshot()
        packed.append(self.residual.read(0, 0), packed_length)
        return packed

    def snapshot(self) -> KIVIStates:
        """The tokens as they are now, without a copy; adding and packing others leaves it as it is."""
        taken = self.with_own_residual()
        taken.sinks = self.sinks.snapshot()
        taken.packed = [(heads, store.snapshot()) for heads, store in self.packed]
        return taken

    def with_own_residual(self) -> KIVIStates:
        """A snapshot for a change of the residual alone; the rest is shared."""
        taken = KIVIStates.__new__(KIVIStates)
        taken.__dict__.update(self.__dict__)
        taken.residual = self.residual.snapshot()
        return taken

    def read(self, tail: Tensor | None = None) -> Tensor:
        """All tokens as one dense tensor ``[batch, kv_heads, tokens, head_dim]``, those of ``tail`` behind them."""
        batch, kv_heads, _, head_dim = self.residual.data.shape
        length = len(self) + (0 if tail is None else tail.shape[2])
        states = self.residual.data.new_empty(batch, kv_heads, length, head_dim)
        first, last = len(self.sinks), len(self.sinks) + self.packed_length
        states[:, :, :first] = self.sinks.read()
        self._read_packed(0, self.packed_length, out=states[:, :, first:last])
        states[:, :, last : len(self)] = self.residual.read()
        if tail is not None:
            states[:, :, len(self) :] = tail
        return states

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens.

        A key group that is cut in two cannot stay packed, its scale covers whole groups: the tokens that remain of it
        go on in the residual with the values they have.
        """
        self.residual.truncate(max(length - len(self.sinks) - self.packed_length, 0))
        keep = min(max(length - len(self.sinks), 0), self.packed_length)
        whole = keep - keep % self.tokens_per_group
        cut = self.residual.data.new_empty(*self.residual.data.shape[:2], keep - whole, self.residual.data.shape[3])
        self._read_packed(whole, keep, out=cut)
        for _, store in self.packed:
            store.truncate(whole)
        self.sinks.truncate(length)
        if cut.shape[2]:  # the residual is empty; its memory may be that of an earlier snapshot
            self.residual = TokenBuffer(cut)
            self.residual.append(cut)

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by ``select`` of it, which may change the batch dimension alone."""
        for store in self._stores():
            store.map_batch(select)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> None:
        for store in self._stores():
            store.to(device, non_blocking)

    def memory(self) -> MemoryReport:
        """The bytes held, see [`MemoryReport`]."""
        packed = [store for _, store in self.packed if isinstance(store, PackedTokens)]
        exact = [store for _, store in self.packed if isinstance(store, TokenBuffer)]
        buffers = [self.sinks, self.residual, *exact, *(buffer for store in packed for buffer in store.buffers)]
        batch, kv_heads, _, head_dim = self.residual.data.shape
        return MemoryReport(
            codes=sum(store.codes.nbytes for store in packed),
            scales=sum(store.scale.nbytes + store.minimum.nbytes for store in packed),
            sinks=self.sinks.nbytes,
            residual=self.residual.nbytes,
            full_precision=sum(store.nbytes for store in exact),
            slack=sum(buffer.allocated_nbytes - buffer.nbytes for buffer in buffers),
            values=batch * kv_heads * len(self) * head_dim,
            packed_values=sum(batch * store.codes.data.shape[1] * len(store) * head_dim for store in packed),
        )

    def pretend(self, length: int, packed_length: int) -> None:
        """Empty states as if a prompt of ``length`` tokens had been appended: their room without their content."""
        sinks = min(length, self.sink_length)
        residual = length - sinks - packed_length
        for store, tokens in ((self.sinks, sinks), (self.residual, residual)):
            store.reserve(tokens)
            store.stop = tokens
        for _, packed in self.packed:
            packed.reserve(packed_length)
            groups = packed_length // self.tokens_per_group
            buffers = (packed,) if isinstance(packed, TokenBuffer) else packed.buffers
            for buffer, stop in zip(buffers, (packed_length, groups, groups), strict=False):
                buffer.stop = stop

    def _read_packed(self, start: int, stop: int, out: Tensor) -> None:
        for heads, store in self.packed:
            if isinstance(heads, slice):
                store.copy_to(out, start, stop)
            else:
                part = out.new_empty(out.shape[0], len(heads), *out.shape[2:])
                store.copy_to(part, start, stop)
                out[:, heads] = part

    def _stores(self) -> list[TokenBuffer | PackedTokens]:
        return [self.sinks, *(store for _, store in self.packed), self.residual]
