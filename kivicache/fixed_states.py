"""[`FixedStates`]: the keys, or the values, of one layer in buffers that never move, for a compiled decode step.

Every tensor is allocated once, for ``max_cache_len`` tokens. How many tokens are where stands in one small tensor on
the device, ``lengths``, so a captured CUDA graph goes on working as they grow: no shape, no Python number and no
branch depends on them. What lies behind the lengths is never read as content.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kivicache.backends import get_backend
from kivicache.buffer import as_ordinary, ordinary_tensors
from kivicache.config import LayerConfig
from kivicache.packing import pack, unpack, words_per_token
from kivicache.policy import packed_lengths
from kivicache.quantization import METADATA_DTYPE, dequantize
from kivicache.rotation import hadamard, rotation_block
from kivicache.states import heads_by_nbits

# New tokens of one compiled step: a token, or a draft to be verified. More are cached outside of the graph.
MAX_STEP_LENGTH = 16
# int32 entries of `lengths`: sinks, packed keys, packed values, all tokens; steps that found no room; work for kernels
SINKS, KEYS, VALUES, TOTAL, REFUSED, TICKET = range(6)
ROW_ALIGNMENT = 16  # so that the rows of every head start where kernels can load 16 elements at once


@dataclass(frozen=True)
class FixedFormat:
    """What the tensors of [`FixedStates`] mean.

    Attributes:
        nbits: of each store, 2, 4, 8, or 16, where "codes" are the states themselves.
        heads: the kv heads of each store.
        group_size, axis, rotation, backend: as in [`KIVIConfig`], the group size in values.
        head_dim: of a token.
        length: the entry of ``lengths`` that counts the packed tokens, ``KEYS`` or ``VALUES``.
        sink_length, residual_length, block_length: of the "window" policy.
        max_cache_len: tokens that the cache holds.
    """

    nbits: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    group_size: int
    axis: str
    rotation: str | None
    backend: str
    head_dim: int
    length: int
    sink_length: int
    residual_length: int
    block_length: int
    max_cache_len: int

    @property
    def tokens_per_group(self) -> int:
        return self.group_size if self.axis == "channel" else 1

    @property
    def tensors(self) -> int:
        """How many there are: sinks, residual, and three for each store."""
        return 2 + 3 * len(self.nbits)

    @property
    def nbits_of_heads(self) -> list[int]:
        of_head = {head: bits for bits, heads in zip(self.nbits, self.heads, strict=True) for head in heads}
        return [of_head[head] for head in range(len(of_head))]

    @property
    def flush_length(self) -> int:
        """The most tokens that can be due at once: those of a full block, and of a step on top."""
        return (self.block_length - 1 + MAX_STEP_LENGTH) // self.block_length * self.block_length

    @property
    def residual_capacity(self) -> int:
        """The most exact tokens that can be behind the packed ones."""
        return self.residual_length + self.block_length - 1 + MAX_STEP_LENGTH


class FixedStore(NamedTuple):
    """The packed tokens of the heads of some bits.

    Attributes:
        codes: int16 words ``[batch, heads, tokens, words]``, or the states themselves.
        scale, minimum: float16, one per group.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor


class FixedStates:
    """Keys or values of one layer: sinks | packed tokens | residual, as in [`KIVIStates`], in fixed buffers.

    Attributes:
        sinks, residual: ``[batch, kv_heads, tokens, head_dim]``, exact. Both end with rows that nobody reads, where
            the tokens go that belong to the other.
        packed: a [`FixedStore`] for the heads of each number of bits.
    """

    def __init__(self, like: Tensor, nbits: Sequence[int], length: int, config: LayerConfig, max_cache_len: int):
        """Empty states with the batch, heads, head_dim, dtype and device of ``like``; ``nbits`` for each head."""
        batch, kv_heads, _, head_dim = like.shape
        axis = (config.axis_key, config.axis_value)[length - KEYS]
        heads = heads_by_nbits(nbits)
        self.format = form = FixedFormat(
            tuple(heads),
            tuple(heads.values()),
            head_dim if config.group_size == -1 else config.group_size,
            axis,
            config.rotation,
            config.backend,
            head_dim,
            length,
            config.sink_length,
            config.residual_length,
            config.block_length,
            max_cache_len,
        )
        if config.rotation is not None:
            rotation_block(head_dim)  # refuses a head_dim that cannot turn
        packed = packed_lengths(config, max_cache_len)[0] + form.flush_length
        groups_width = head_dim if axis == "channel" else -(-head_dim // form.group_size)

        def zeros(heads: int, tokens: int, width: int, dtype: torch.dtype = like.dtype) -> Tensor:
            return static(torch.zeros(batch, heads, tokens, width, dtype=dtype, device=like.device))

        self.sinks = zeros(kv_heads, config.sink_length + MAX_STEP_LENGTH, head_dim)
        rows = form.residual_capacity + MAX_STEP_LENGTH
        self.residual = zeros(kv_heads, -(-rows // ROW_ALIGNMENT) * ROW_ALIGNMENT, head_dim)
        self.packed = []
        for bits, members in heads.items():
            groups = packed // form.tokens_per_group if bits < 16 else 0
            words, dtype = (words_per_token(head_dim, bits), torch.int16) if bits < 16 else (head_dim, like.dtype)
            codes = zeros(len(members), packed, words, dtype)
            scale, minimum = (zeros(len(members), groups, groups_width, METADATA_DTYPE) for _ in range(2))
            self.packed.append(FixedStore(codes, scale, minimum))
        self.signature = astuple(form)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A deep copy, in this process or another."""
        self.__dict__.update(state)
        self._hold([static(tensor) for tensor in self.tensors])

    @classmethod
    def view(cls, tensors: Sequence[Tensor], form: FixedFormat) -> FixedStates:
        """States in tensors that are there."""
        states = cls.__new__(cls)
        states.format, states.signature = form, astuple(form)
        states._hold(tensors)
        return states

    @property
    def tensors(self) -> list[Tensor]:
        """Sinks, residual, and codes, scale and minimum of each store."""
        return [self.sinks, self.residual, *(tensor for store in self.packed for tensor in store)]

    def _hold(self, tensors: Sequence[Tensor]) -> None:
        self.sinks, self.residual, *packed = tensors
        self.packed = [FixedStore(*packed[first : first + 3]) for first in range(0, len(packed), 3)]

    def selected(self, select: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """``select`` of every tensor, which may change the batch dimension alone."""
        with ordinary_tensors():
            return [select(tensor) for tensor in self.tensors]

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Take over the content of ``tensors``, and the tensors themselves where the batch is another."""
        with ordinary_tensors():
            pairs = zip(self.tensors, tensors, strict=True)
            self._hold([own.copy_(new) if own.shape == new.shape else static(new) for own, new in pairs])

    def flush(self, lengths: Tensor, due: Tensor) -> None:
        """Pack the ``due`` oldest tokens of the residual.

        Without a branch on what is due: [`FixedFormat.flush_length`] tokens are quantized and written behind the
        packed ones each time, and count only once the lengths say so.
        """
        form, packed = self.format, lengths[self.format.length].long()
        tokens = torch.arange(form.flush_length, device=lengths.device)
        states = self.residual[:, :, : form.flush_length]
        groups = tokens[: form.flush_length // form.tokens_per_group] + packed // form.tokens_per_group
        backend = get_backend(form.backend)
        for store, bits, heads in zip(self.packed, form.nbits, form.heads, strict=True):
            # views and a concatenation: an index would be a tensor of its own in the graph
            part = states if len(self.packed) == 1 else torch.stack([states[:, head] for head in heads], dim=1)
            if bits == 16:
                store.codes.index_copy_(2, packed + tokens, part)
                continue
            if form.rotation is not None:
                part = hadamard(part.float())
            codes, scale, minimum = backend.quantize(part, bits, form.group_size, form.axis)
            store.codes.index_copy_(2, packed + tokens, pack(codes, bits))
            store.scale.index_copy_(2, groups, scale)
            store.minimum.index_copy_(2, groups, minimum)
        rows = torch.arange(self.residual.shape[2], device=lengths.device) + due
        self.residual.copy_(self.residual.index_select(2, rows.clamp(max=self.residual.shape[2] - 1)))

    def write(self, states: Tensor, lengths: Tensor, packed: Tensor) -> None:
        """Store new tokens ``[batch, kv_heads, tokens, head_dim]``, of which the first ones may still be sinks."""
        new = torch.arange(states.shape[2], device=lengths.device)
        position = lengths[TOTAL].long() + new
        sink_length, capacity = self.format.sink_length, self.format.residual_capacity
        self.sinks.index_copy_(2, torch.where(position < sink_length, position, sink_length + new), states)
        row = position - sink_length - packed
        self.residual.index_copy_(2, torch.where(row >= 0, row, capacity + new), states)

    def dense(self, lengths: Tensor) -> Tensor:
        """``[batch, kv_heads, max_cache_len, head_dim]``: all tokens, and zeros behind them."""
        form = self.format
        sinks = self.sinks[:, :, : form.sink_length]
        packed_end = form.sink_length + lengths[form.length].long()
        dense = torch.cat([sinks, self._dequantized(), torch.zeros_like(self.residual)], dim=2)
        rows = torch.arange(self.residual.shape[2], device=lengths.device)
        dense = dense.index_copy(2, packed_end + rows, self.residual)[:, :, : form.max_cache_len]
        position = torch.arange(dense.shape[2], device=lengths.device)
        dense = torch.where((position < lengths[TOTAL])[:, None], dense, 0.0)
        return torch.nn.functional.pad(dense, (0, 0, 0, form.max_cache_len - dense.shape[2]))

    def _dequantized(self) -> Tensor:
        """All that the stores have room for, ``[batch, kv_heads, tokens, head_dim]``."""
        form = self.format
        of_head: dict[int, Tensor] = {}
        for store, bits, heads in zip(self.packed, form.nbits, form.heads, strict=True):
            states = store.codes
            if bits < 16:
                codes = unpack(store.codes, bits, form.head_dim)
                states = dequantize(codes, store.scale, store.minimum, form.group_size, form.axis)
                states = (states if form.rotation is None else hadamard(states)).to(self.residual.dtype)
            if len(self.packed) == 1:
                return states
            of_head.update(zip(heads, states.unbind(1), strict=True))
        return torch.stack([of_head[head] for head in range(len(of_head))], dim=1)


def static(tensor: Tensor) -> Tensor:
    """``tensor`` for steps to write to: in place, outside of inference mode too, and without compiling again."""
    tensor = as_ordinary(tensor)
    torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


def append(keys: FixedStates, values: FixedStates, lengths: Tensor, key_states: Tensor, value_states: Tensor) -> None:
    """One step: pack what has left the window by the tokens of earlier steps, then store the new tokens.

    So the new tokens attend to what was packed before they came, as in the growing cache. Tokens for which there is
    no room are not stored, and ``lengths[REFUSED]`` counts the step.
    """
    form, total = keys.format, lengths[TOTAL]
    left_window = (total - form.sink_length - form.residual_length).clamp(min=0)
    target = left_window - left_window % form.block_length
    room = total + key_states.shape[2] <= form.max_cache_len
    packed = []
    for store, states in ((keys, key_states), (values, value_states)):
        before = lengths[store.format.length]
        after = torch.maximum(before, target)
        store.flush(lengths, after - before)
        store.write(states, lengths, after)
        packed.append(after)
    total = torch.where(room, total + key_states.shape[2], total)
    refused = lengths[REFUSED] + ~room
    sinks = total.clamp(max=form.sink_length)
    lengths.copy_(torch.stack([sinks, *packed, total, refused, lengths[TICKET]]))
