"""The compiled seam: [`FixedPackedStates`], and what a graph holds of a step: its update and its attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kivicache.attention import PackedStates, head_pairs
from kivicache.backends import mse
from kivicache.buffer import TokenBuffer
from kivicache.fixed_states import FixedFormat, FixedStates, append
from kivicache.triton import on_device
from kivicache.triton.operands import Pair, Store, Tokens

_PLACES_ALIGNMENT = 4  # int32 entries: each pair's begin on 16 bytes, as a kernel compiled for one pair expects


class FixedPackedStates(PackedStates):
    """[`PackedStates`] of fixed buffers: ``[batch, kv_heads, max_cache_len, head_dim]``, which dynamo can trace.

    Its tensors are those of [`FixedStates`], then ``lengths``, and of the keys the heads' places, where there are any.
    """

    form: FixedFormat

    @staticmethod
    def __new__(cls, tensors: Sequence[Tensor], form: FixedFormat, shape: Sequence[int]) -> FixedPackedStates:
        like = tensors[0]
        return Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, tensors: Sequence[Tensor], form: FixedFormat, shape: Sequence[int]):
        self.count = len(tensors)
        for i, tensor in enumerate(tensors):  # attributes, as dynamo flattens them by their names
            setattr(self, f"kivi_{i}", tensor)
        self.form = form
        self._dense = None

    @staticmethod
    def of(states: FixedStates, lengths: Tensor, places: Tensor | None = None) -> FixedPackedStates:
        more = [lengths] if places is None else [lengths, places]
        return _wrap(states.signature, *states.tensors, *more)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [f"kivi_{i}" for i in range(self.count)], (self.form, tuple(self.shape))

    @staticmethod
    def __tensor_unflatten__(
        inner_tensors: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> FixedPackedStates:
        form, _ = context
        return FixedPackedStates([inner_tensors[f"kivi_{i}"] for i in range(len(inner_tensors))], form, outer_size)

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, f"kivi_{i}") for i in range(self.count)]

    def _read(self) -> Tensor:
        states, lengths = self.tensors[: self.form.tensors], self.tensors[self.form.tensors]
        return FixedStates.view(states, self.form).dense(lengths)

    def with_shape(self, shape: Sequence[int]) -> FixedPackedStates:
        return FixedPackedStates(self.tensors, self.form, shape)

    def fused(
        self,
        query: Tensor,
        value: PackedStates,
        attention_mask: Tensor | None,
        scaling: float,
        softcap: float,
        s_aux: Tensor | None,
    ) -> Tensor:
        assert isinstance(value, FixedPackedStates)
        keys, values = self.form, value.form
        places = self.tensors[keys.tensors + 1 :]
        return torch.ops.kivicache.attend(
            query,
            self.tensors[: keys.tensors],
            value.tensors[: values.tensors],
            self.tensors[keys.tensors],
            places[0] if places else None,
            [number for i, j, heads in head_pairs(keys.heads, values.heads) for number in (i, j, len(heads[0]))],
            attention_mask,
            s_aux,
            scaling,
            softcap,
            list(keys.nbits),
            list(values.nbits),
            [keys.group_size, values.group_size],
            keys.axis,
            values.axis,
            keys.rotation is not None,
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not torch.compiler.is_compiling():
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # "sdpa" in a graph is dense: it repeats the heads while tracing
            return func(*args, **(kwargs or {}))


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]
def _wrap(signature: Any, *tensors: Tensor) -> FixedPackedStates:
    form = FixedFormat(*signature)
    return FixedPackedStates(tensors, form, (*tensors[0].shape[:2], form.max_cache_len, form.head_dim))


def places_of_heads(key_heads: Sequence[tuple[int, ...]], value_heads: Sequence[tuple[int, ...]]) -> Tensor | None:
    """The places of [`head_pairs`], int32, one pair's after the other's; None where one pair has all heads in order.

    A graph cannot make such a tensor from numbers of the host, so it is one of the layer's own.
    """
    pairs = head_pairs(key_heads, value_heads)
    if len(pairs) == 1:
        return None
    flat: list[int] = []
    for *_, places in pairs:
        flat += [head for row in places for head in row]
        flat += [0] * (-len(flat) % _PLACES_ALIGNMENT)
    return torch.tensor(flat, dtype=torch.int32)


def _stores(buffers: list[TokenBuffer], nbits: list[int], group_size: int) -> list[Store]:
    of_stores = zip(buffers[::3], buffers[1::3], buffers[2::3], nbits, strict=True)
    return [Store(codes, scale, minimum, bits, group_size) for codes, scale, minimum, bits in of_stores]


def _attend(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    lengths: Tensor,
    places: Tensor | None,
    pairs: list[int],
    mask: Tensor | None,
    s_aux: Tensor | None,
    scale: float,
    softcap: float,
    nbits_key: list[int],
    nbits_value: list[int],
    group_sizes: list[int],
    axis_key: str,
    axis_value: str,
    rotated: bool,
) -> Tensor:
    from kivicache.triton.decode import decode_attention  # triton is optional

    key_sinks, key_residual, *packed_keys = map(TokenBuffer.of, keys)
    value_sinks, value_residual, *packed_values = map(TokenBuffer.of, values)
    key_stores = _stores(packed_keys, nbits_key, group_sizes[0])
    value_stores = _stores(packed_values, nbits_value, group_sizes[1])
    of_pairs: list[Pair] = []
    offset = 0
    for first in range(0, len(pairs), 3):  # a store of the keys, one of the values, and how many heads share them
        i, j, heads = pairs[first : first + 3]
        at = None if places is None else places[offset : offset + 3 * heads].view(3, heads)
        offset += -(-3 * heads // _PLACES_ALIGNMENT) * _PLACES_ALIGNMENT
        of_pairs.append(Pair(key_stores[i], value_stores[j], at))
    with on_device(query):
        return decode_attention(
            query,
            Tokens(key_sinks, key_residual, axis_key),
            Tokens(value_sinks, value_residual, axis_value),
            of_pairs,
            rotated=rotated,
            mask=mask,
            scale=scale,
            softcap=softcap,
            s_aux=s_aux,
            lengths=lengths,
        )


_attend_op = torch.library.custom_op(
    "kivicache::attend",
    _attend,
    mutates_args=(),
    schema="(Tensor query, Tensor[] keys, Tensor[] values, Tensor lengths, Tensor? places, int[] pairs, Tensor? mask, "
    "Tensor? s_aux, float scale, float softcap, int[] nbits_key, int[] nbits_value, int[] group_sizes, str axis_key, "
    "str axis_value, bool rotated) -> Tensor",
)


@_attend_op.register_fake
def _(query: Tensor, keys: list[Tensor], values: list[Tensor], *arguments: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], values[0].shape[3]))  # the values' sinks


def _append(
    keys: list[Tensor],
    values: list[Tensor],
    lengths: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    nbits: list[int],
    group_size: int,
    axis_key: str,
    axis_value: str,
    rotated: bool,
    backend: str,
    sink_length: int,
    residual_length: int,
    block_length: int,
    flush_length: int,
    max_cache_len: int,
) -> None:
    from kivicache.triton.append import append as append_kernel  # triton is optional

    with on_device(lengths):
        append_kernel(
            tuple(keys),
            tuple(values),
            lengths,
            key_states,
            value_states,
            nbits=tuple(nbits),
            group_size=group_size,
            axes=(axis_key, axis_value),
            rotated=rotated,
            least_squares=(mse.STARTS, mse.NARROWING, mse.ROUNDS) if backend == "mse" else (),
            sink_length=sink_length,
            residual_length=residual_length,
            block_length=block_length,
            flush_length=flush_length,
            max_cache_len=max_cache_len,
        )


_append_op = torch.library.custom_op(
    "kivicache::append",
    _append,
    mutates_args=("keys", "values", "lengths"),
    schema="(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor(c!) lengths, Tensor key_states, Tensor value_states, "
    "int[] nbits, int group_size, str axis_key, str axis_value, bool rotated, str backend, int sink_length, "
    "int residual_length, int block_length, int flush_length, int max_cache_len) -> ()",
)


@_append_op.register_fake
def _(*arguments: Any) -> None:
    return None


def append_step(
    keys: FixedStates,
    values: FixedStates,
    lengths: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    kernels: bool,
) -> None:
    """[`kivicache.fixed_states.append`], by one kernel where ``kernels`` says that they serve."""
    if not kernels:
        return append(keys, values, lengths, key_states, value_states)
    form = keys.format
    torch.ops.kivicache.append(
        list(keys.tensors),
        list(values.tensors),
        lengths,
        key_states,
        value_states,
        [*form.nbits, *values.format.nbits],
        form.group_size,
        form.axis,
        values.format.axis,
        form.rotation is not None,
        form.backend,
        form.sink_length,
        form.residual_length,
        form.block_length,
        form.flush_length,
        form.max_cache_len,
    )
