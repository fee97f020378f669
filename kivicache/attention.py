"""The seam: how packed keys and values travel through a model's own attention to the fused kernel.

A layer's ``update`` returns [`PackedStates`], tensors in all but content. ``scaled_dot_product_attention``, where it
meets them, becomes one fused pass over the packed bytes; any other operation sees the dense tensor, so every attention
implementation works. The attention named "kivi" (``model.set_attn_implementation("kivi")``) calls the fused pass
itself, which also serves models that ``sdpa`` does not: it knows softcap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kivicache.buffer import TokenBuffer
from kivicache.packed import PackedTokens
from kivicache.states import KIVIStates
from kivicache.triton import missing_triton, on_device, serves
from kivicache.triton.operands import Pair, Store, Tokens

FUSED_DEVICES = ["cuda"]
FUSED_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
MAX_HEAD_DIM = 256
MAX_QUERY_LENGTH = 16
# the repeat of the key heads for GQA in transformers: states[:, :, None, :, :].expand(...).reshape(...)
_NEW_AXIS = (slice(None), slice(None), None, slice(None), slice(None))


class PackedStates(Tensor):
    """All keys, or all values, of a layer: a tensor ``[batch, kv_heads, tokens, head_dim]`` that is still packed.

    It becomes dense under any operation but the fused attention, and but the repetition of its heads for grouped
    queries, which stays a matter of shape: ``[batch, heads, tokens, head_dim]`` with ``heads`` a multiple.
    """

    kivi_states: KIVIStates
    _dense: Tensor | None

    @staticmethod
    def __new__(cls, states: KIVIStates, shape: Sequence[int] | None = None) -> PackedStates:
        like = states.residual.data
        shape = shape or (like.shape[0], like.shape[1], len(states), like.shape[3])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, states: KIVIStates, shape: Sequence[int] | None = None):
        self.kivi_states = states
        self._dense = None

    def dense(self) -> Tensor:
        """The tensor itself, dequantized."""
        if self._dense is None:
            states = self._read()
            batch, kv_heads, tokens, head_dim = states.shape
            repeats = self.numel() // states.numel()
            self._dense = states[_NEW_AXIS].expand(batch, kv_heads, repeats, tokens, head_dim).reshape(self.shape)
        return self._dense

    def _read(self) -> Tensor:
        return self.kivi_states.read()

    def with_shape(self, shape: Sequence[int]) -> PackedStates:
        """The same states with their heads repeated."""
        return PackedStates(self.kivi_states, shape)

    def fused(
        self,
        query: Tensor,
        value: PackedStates,
        attention_mask: Tensor | None,
        scaling: float,
        softcap: float,
        s_aux: Tensor | None,
    ) -> Tensor:
        """[`fused_attention`] with these keys."""
        from kivicache.triton.decode import decode_attention  # triton is optional

        keys, values = self.kivi_states, value.kivi_states
        pairs = [
            Pair(_store(keys.packed[i][1]), _store(values.packed[j][1]), heads)
            for i, j, heads in _placed_pairs(keys.heads, values.heads, query.device)
        ]
        with on_device(query):
            return decode_attention(
                query,
                Tokens(keys.sinks, keys.residual, keys.axis),
                Tokens(values.sinks, values.residual, values.axis),
                pairs,
                rotated=keys.rotation is not None,
                mask=attention_mask,
                scale=scaling,
                softcap=softcap,
                s_aux=s_aux,
            )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedStates(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is scaled_dot_product_attention:
                return _scaled_dot_product_attention(*args, **kwargs)
            repeated = _repeated(func, args) if func in _REPEATING else None
            return func(*args, **kwargs) if repeated is None else repeated

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares its disabled form
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*tree_map(_as_dense, args), **tree_map(_as_dense, kwargs or {}))


_REPEATING = (Tensor.__getitem__, Tensor.expand, Tensor.reshape)


def _repeated(func: Callable[..., Any], args: Any) -> PackedStates | None:
    """The states with one step of the repetition of their heads done, or None where ``func`` does something else."""
    states, *rest = args
    if getattr(states, "_dense", None) is not None:  # it may have been written to
        return None
    if func is Tensor.__getitem__:
        index = rest[0] if isinstance(rest[0], tuple) else ()
        if states.dim() != 4 or any(isinstance(part, Tensor) for part in index) or index != _NEW_AXIS:
            return None
        shape = (*states.shape[:2], 1, *states.shape[2:])
    else:
        shape = tuple(rest[0]) if len(rest) == 1 and not isinstance(rest[0], int) else tuple(rest)
        if states.dim() != 5:
            return None
        batch, kv_heads, repeats, tokens, head_dim = states.shape
        if func is Tensor.expand and (repeats != 1 or shape[:2] + shape[3:] != (batch, kv_heads, tokens, head_dim)):
            return None
        if func is Tensor.reshape and shape != (batch, kv_heads * repeats, tokens, head_dim):
            return None
    return states.with_shape(shape)


def _as_dense(x: Any) -> Any:
    return x.dense() if isinstance(x, PackedStates) else x


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, fused where the query allows it, else on dense tensors."""
    causal = is_causal and query.shape[2] > 1
    if dropout_p == 0 and not causal and not query_reasons(query, key, value, attn_mask, scale):
        return fused_attention(query, key, value, attn_mask, scale)
    return scaled_dot_product_attention(
        _as_dense(query),
        _as_dense(key),
        _as_dense(value),
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def kivi_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function "kivi" of transformers: fused over packed states, ``sdpa`` over plain tensors.

    Args:
        module: the attention layer.
        query: ``[batch, heads, query_length, head_dim]``.
        key, value: ``[batch, kv_heads, tokens, head_dim]``, as the cache returned them.
        attention_mask: bool or additive ``[batch, 1 or heads, query_length, tokens]``, or None.
        dropout: of the attention weights, while training.
        scaling: of the scores; default ``head_dim ** -0.5``.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        s_aux: ``[heads]``, one more score that every query attends to (the sinks of gpt-oss).

    Returns:
        ``[batch, query_length, heads, head_dim]`` and None, as there are no weights.
    """
    biased = kwargs.get("position_bias") is not None
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = attention_mask is None and query.shape[2] > 1 and bool(is_causal)  # as transformers' sdpa has it
    plain = not biased and not causal and dropout == 0
    if plain and not query_reasons(query, key, value, attention_mask, scaling, s_aux):
        return fused_attention(query, key, value, attention_mask, scaling, softcap, s_aux).transpose(1, 2), None
    key, value = _as_dense(key), _as_dense(value)
    if s_aux is None and softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if biased:
        raise ValueError("position_bias: allowed without softcap and s_aux only; no known model has both")
    output = _explicit_attention(query, key, value, attention_mask, causal, dropout, scaling, softcap, s_aux)
    return output.transpose(1, 2), None


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention on dense tensors written out, for what ``scaled_dot_product_attention`` does not know."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros_like(scores).masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        scores = scores + attention_mask
    if s_aux is not None:  # one more score per head, which takes its share of the softmax and has no value
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return torch.nn.functional.dropout(weights[..., : value.shape[2]], dropout) @ value


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention of a few query tokens over packed keys and values, in one pass over their bytes.

    Args:
        query: ``[batch, heads, query_length, head_dim]``.
        key, value: [`PackedStates`].
        attention_mask: None, bool (True: attend) or additive, ``[batch, 1 or heads, 1 or query_length, tokens]``.
        scaling: of the scores; default ``head_dim ** -0.5``.
        softcap, s_aux: as in [`kivi_attention_forward`].

    Returns:
        ``[batch, heads, query_length, head_dim]`` of the values, of the query's dtype.
    """
    assert isinstance(key, PackedStates) and isinstance(value, PackedStates)
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return key.fused(query, value, attention_mask, scaling, abs(float(softcap or 0.0)), s_aux)


def store_tokens(keys: TokenBuffer, values: TokenBuffer, key_states: Tensor, value_states: Tensor) -> None:
    """Append new tokens to both buffers, in one launch where the kernels serve."""
    if not serves(key_states.device):
        keys.append(key_states)
        values.append(value_states)
        return
    from kivicache.triton.store import store_tokens  # triton is optional

    with on_device(key_states):
        store_tokens(keys, values, key_states, value_states)


def _store(store: TokenBuffer | PackedTokens) -> Store:
    if isinstance(store, PackedTokens):
        return Store(*store.buffers, store.nbits, store.group_size)
    return Store(store, store, store, 16, 32)


def head_pairs(
    key_heads: Sequence[tuple[int, ...]], value_heads: Sequence[tuple[int, ...]]
) -> list[tuple[int, int, list[list[int]]]]:
    """Which heads share both a store of keys and one of values: the stores' indices, and the heads' places.

    The places are ``[3, heads]``: the kv head, and where it lies in either store.
    """
    pairs = []
    for i, in_keys in enumerate(key_heads):
        for j, in_values in enumerate(value_heads):
            heads = [head for head in in_keys if head in in_values]
            if heads:
                places = [heads, [in_keys.index(head) for head in heads], [in_values.index(head) for head in heads]]
                pairs.append((i, j, places))
    return pairs


@functools.lru_cache
def _placed_pairs(
    key_heads: tuple[tuple[int, ...], ...], value_heads: tuple[tuple[int, ...], ...], device: torch.device
) -> list[tuple[int, int, Tensor | None]]:
    """[`head_pairs`] with the places on the device, int32; None where there is one store of either: all heads."""
    pairs = head_pairs(key_heads, value_heads)
    if len(pairs) == 1:
        return [(0, 0, None)]
    return [(i, j, torch.tensor(places, dtype=torch.int32, device=device)) for i, j, places in pairs]


def query_reasons(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    s_aux: Tensor | None = None,
) -> list[str]:
    """Why the fused attention cannot serve this query; empty where it can."""
    if not (isinstance(key, PackedStates) and isinstance(value, PackedStates)):
        return ["keys or values are dense"]
    reasons = []
    if not torch.compiler.is_compiling() and not (key._dense is None and value._dense is None):
        reasons.append("keys or values have been read as dense tensors, which may have been written to")
    if scaling is not None and scaling <= 0:
        reasons.append(f"scaling is {scaling}")
    if query.dtype != key.dtype:
        reasons.append(f"query is {query.dtype}, keys are {key.dtype}")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, attention_mask, s_aux)):
        reasons.append("the fused attention has no backward pass")
    if query.shape[0] != key.shape[0]:
        reasons.append(f"query has {query.shape[0]} sequences, keys have {key.shape[0]}")
    if attention_mask is not None and (
        attention_mask.dim() != 4
        or attention_mask.shape[-1] != key.shape[-2]
        or any(attention_mask.shape[dim] not in (1, query.shape[dim]) for dim in range(3))
    ):
        reasons.append(f"attention_mask has shape {list(attention_mask.shape)}")
    return reasons


def layer_reasons(keys: KIVIStates, values: KIVIStates) -> list[str]:
    """Why the fused attention cannot serve a layer that holds these states; empty where it can."""
    device = keys.residual.data.device
    reasons = (
        [] if device.type in FUSED_DEVICES else [f"the device is {device.type}, not {' or '.join(FUSED_DEVICES)}"]
    )
    reasons += missing_triton()
    dtypes = [states.residual.data.dtype for states in (keys, values)]
    if dtypes[0] != dtypes[1]:
        reasons.append(f"keys are {dtypes[0]}, values are {dtypes[1]}")
    if dtypes[0] not in FUSED_DTYPES:
        reasons.append(f"the dtype is {dtypes[0]}")
    if max(states.residual.data.shape[3] for states in (keys, values)) > MAX_HEAD_DIM:
        reasons.append(f"head_dim is over {MAX_HEAD_DIM}")
    exact = [[isinstance(store, TokenBuffer) for _, store in side.packed] for side in (keys, values)]
    if all(exact[0]) and all(exact[1]):
        reasons.append("nothing is packed: keys and values have 16 bits")
    if keys.rotation is not None and any(exact[1]) and not all(exact[1]):
        reasons.append("some values are rotated, others have 16 bits")
    return reasons


AttentionInterface.register("kivi", kivi_attention_forward)
# With the function alone, transformers would silently make no mask at all, left padding included.
AttentionMaskInterface.register("kivi", sdpa_mask)
