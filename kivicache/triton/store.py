"""Store new keys and values behind the newest ones, both in one launch."""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from kivicache.buffer import TokenBuffer
from kivicache.triton.launch import Launcher


@triton.jit(
    do_not_specialize=[
        "n_k",
        "n_v",
        "sk_b",
        "sk_h",
        "sk_t",
        "sv_b",
        "sv_h",
        "sv_t",
        "dk_b",
        "dk_h",
        "dv_b",
        "dv_h",
    ]
)
def store_kernel(
    k_ptr,  # [B, H, T, DK], any strides but the last
    v_ptr,  # [B, H, T, DV]
    k_out_ptr,  # [B, H, capacity, DK]
    v_out_ptr,  # [B, H, capacity, DV]
    n_k,  # the token of the outputs where the new ones begin
    n_v,
    sk_b,
    sk_h,
    sk_t,
    sv_b,
    sv_h,
    sv_t,
    dk_b,
    dk_h,
    dv_b,
    dv_h,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program: one token of one head."""
    i_t = tl.program_id(0).to(tl.int64)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    c = tl.arange(0, BLOCK_K)
    x = tl.load(k_ptr + i_b * sk_b + i_h * sk_h + i_t * sk_t + c, mask=c < DK)
    tl.store(k_out_ptr + i_b * dk_b + i_h * dk_h + (n_k + i_t) * DK + c, x, mask=c < DK)
    c = tl.arange(0, BLOCK_V)
    x = tl.load(v_ptr + i_b * sv_b + i_h * sv_h + i_t * sv_t + c, mask=c < DV)
    tl.store(v_out_ptr + i_b * dv_b + i_h * dv_h + (n_v + i_t) * DV + c, x, mask=c < DV)


def store_tokens(keys: TokenBuffer, values: TokenBuffer, key_states: Tensor, value_states: Tensor) -> None:
    """Twin of ``keys.append(key_states)`` and ``values.append(value_states)``.

    Args:
        keys, values: buffers ``[batch, heads, tokens, head_dim]`` of the states' dtype.
        key_states, value_states: ``[batch, heads, new_tokens, head_dim]``.
    """
    batch, heads, tokens, dk = key_states.shape
    key_states, value_states = _rows(key_states), _rows(value_states)
    keys.reserve(tokens)
    values.reserve(tokens)
    _launcher(heads, dk, value_states.shape[3])(
        (tokens, batch * heads, 1),
        (key_states, value_states, keys.data, values.data),
        (
            keys.stop,
            values.stop,
            *key_states.stride()[:3],
            *value_states.stride()[:3],
            *keys.strides,
            *values.strides,
        ),
        (
            key_states.device.index,
            key_states.dtype,
            key_states.data_ptr() % 16 == 0,
            value_states.data_ptr() % 16 == 0,
        ),
    )
    keys.stop += tokens
    values.stop += tokens


def _rows(states: Tensor) -> Tensor:
    states = states.detach()
    return states if states.stride(3) == 1 else states.contiguous()


@functools.lru_cache
def _launcher(heads: int, dk: int, dv: int) -> Launcher:
    blocks = {"BLOCK_K": triton.next_power_of_2(dk), "BLOCK_V": triton.next_power_of_2(dv)}
    return Launcher(store_kernel, {"H": heads, "DK": dk, "DV": dv} | blocks, num_warps=1)
