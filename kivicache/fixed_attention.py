"""The compiled seam: [`FixedPackedStates`], and what a graph holds of a step: its update and its attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kivicache.attention import PackedStates
from kivicache.buffer import TokenBuffer
from kivicache.fixed_states import FixedFormat, FixedStates, append
from kivicache.triton import on_device
from kivicache.triton.operands import Pair, Store, Tokens

_TENSORS = ("kivi_sinks", "kivi_codes", "kivi_scale", "kivi_minimum", "kivi_residual", "kivi_lengths")


class FixedPackedStates(PackedStates):
    """[`PackedStates`] of fixed buffers: ``[batch, kv_heads, max_cache_len, head_dim]``, which dynamo can trace."""

    kivi_lengths: Tensor
    form: FixedFormat

    @staticmethod
    def __new__(cls, tensors: Sequence[Tensor], form: FixedFormat, shape: Sequence[int]) -> FixedPackedStates:
        like = tensors[_TENSORS.index("kivi_residual")]
        return Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, tensors: Sequence[Tensor], form: FixedFormat, shape: Sequence[int]):
        for name, tensor in zip(_TENSORS, tensors, strict=True):
            setattr(self, name, tensor)
        self.form = form
        self._dense = None

    @staticmethod
    def of(states: FixedStates, lengths: Tensor) -> FixedPackedStates:
        return _wrap(*states.tensors, lengths, states.signature)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(_TENSORS), (self.form, tuple(self.shape))

    @staticmethod
    def __tensor_unflatten__(
        inner_tensors: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> FixedPackedStates:
        form, _ = context
        return FixedPackedStates([inner_tensors[name] for name in _TENSORS], form, outer_size)

    @property
    def tensors(self) -> list[Tensor]:
        """All but the lengths."""
        return [getattr(self, name) for name in _TENSORS[:-1]]

    def _read(self) -> Tensor:
        return FixedStates.view(self.tensors, self.form).dense(self.kivi_lengths)

    def with_shape(self, shape: Sequence[int]) -> FixedPackedStates:
        return FixedPackedStates([*self.tensors, self.kivi_lengths], self.form, shape)

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
        return torch.ops.kivicache.attend(
            query,
            self.tensors,
            value.tensors,
            self.kivi_lengths,
            attention_mask,
            s_aux,
            scaling,
            softcap,
            [self.form.nbits, value.form.nbits],
            [self.form.group_size, value.form.group_size],
            self.form.axis,
            value.form.axis,
            self.form.rotation is not None,
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
def _wrap(
    sinks: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor, residual: Tensor, lengths: Tensor, signature: Any
) -> FixedPackedStates:
    form = FixedFormat(*signature)
    shape = (*residual.shape[:2], form.max_cache_len, form.head_dim)
    return FixedPackedStates((sinks, codes, scale, minimum, residual, lengths), form, shape)


def _attend(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    lengths: Tensor,
    mask: Tensor | None,
    s_aux: Tensor | None,
    scale: float,
    softcap: float,
    nbits: list[int],
    group_sizes: list[int],
    axis_key: str,
    axis_value: str,
    rotated: bool,
) -> Tensor:
    from kivicache.triton.decode import decode_attention  # triton is optional

    key_sinks, key_words, key_scale, key_minimum, key_residual = map(TokenBuffer.of, keys)
    value_sinks, value_words, value_scale, value_minimum, value_residual = map(TokenBuffer.of, values)
    pair = Pair(
        Store(key_words, key_scale, key_minimum, nbits[0], group_sizes[0]),
        Store(value_words, value_scale, value_minimum, nbits[1], group_sizes[1]),
    )
    with on_device(query):
        return decode_attention(
            query,
            Tokens(key_sinks, key_residual, axis_key),
            Tokens(value_sinks, value_residual, axis_value),
            [pair],
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
    schema="(Tensor query, Tensor[] keys, Tensor[] values, Tensor lengths, Tensor? mask, Tensor? s_aux, float scale, "
    "float softcap, int[] nbits, int[] group_sizes, str axis_key, str axis_value, bool rotated) -> Tensor",
)


@_attend_op.register_fake
def _(query: Tensor, keys: list[Tensor], values: list[Tensor], *arguments: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], values[0].shape[3]))


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
    sink_length: int,
    residual_length: int,
    block_length: int,
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
            sink_length=sink_length,
            residual_length=residual_length,
            block_length=block_length,
            max_cache_len=max_cache_len,
        )


_append_op = torch.library.custom_op(
    "kivicache::append",
    _append,
    mutates_args=("keys", "values", "lengths"),
    schema="(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor(c!) lengths, Tensor key_states, Tensor value_states, "
    "int[] nbits, int group_size, str axis_key, str axis_value, int sink_length, int residual_length, "
    "int block_length, int max_cache_len) -> ()",
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
        [form.nbits, values.format.nbits],
        form.group_size,
        form.axis,
        values.format.axis,
        form.sink_length,
        form.residual_length,
        form.block_length,
        form.max_cache_len,
    )
