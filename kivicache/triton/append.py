"""One decode step of a fixed-capacity cache: pack what is due, keep the new tokens, move the lengths on. One launch.

The twin of ``kivicache.fixed_states.append``, which says what is due; the bytes are those of pack.py, or of
least_squares.py. Nothing here depends on a number of the host, so a captured graph goes on working.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kivicache.rotation import rotation_block
from kivicache.triton.least_squares import least_squares_range
from kivicache.triton.pack import _encode, _group_range, _scale_minimum
from kivicache.triton.rotate import hadamard_rows

TILE = tl.constexpr(16)  # tokens that are moved, rotated or packed along themselves at once


@triton.jit
def _fit(x, ok, DIM: tl.constexpr, LEVELS: tl.constexpr, LEAST_SQUARES: tl.constexpr):
    """Scale and minimum of groups along DIM: min-max, or with LEAST_SQUARES (not empty) as of backends/mse.py."""
    low, high = _group_range(x, ok, DIM)
    if len(LEAST_SQUARES) == 0:
        return _scale_minimum(low, high, LEVELS)
    else:
        # not starred: Triton 3.6 cannot
        return least_squares_range(x, ok, low, high, DIM, LEVELS, LEAST_SQUARES[0], LEAST_SQUARES[1], LEAST_SQUARES[2])


@triton.jit
def _flush_channel(
    x_ptr,  # [due, D]: the oldest tokens of one head's residual, rotated where packed tokens are
    word_ptr,  # int16 [T, W]
    scale_ptr,
    min_ptr,  # float16 [T / G, D]
    packed,
    due,
    NBITS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    LEAST_SQUARES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Pack ``due`` tokens, whole groups of G, behind the ``packed`` ones."""
    r = tl.arange(0, BLOCK_G)
    w = tl.arange(0, BLOCK_W)
    for g in range(due // G):
        words = tl.zeros([BLOCK_G, BLOCK_W], tl.int32)
        table = (packed // G + g) * D
        for f in tl.static_range(16 // NBITS):
            c = f * W + w
            ok = (r < G)[:, None] & ((w < W) & (c < D))[None, :]
            x = tl.load(x_ptr + (g * G + r)[:, None] * D + c[None, :], mask=ok, other=0.0).to(tl.float32)
            scale, minimum = _fit(x, ok, 0, (1 << NBITS) - 1, LEAST_SQUARES)
            tl.store(scale_ptr + table + c, scale, mask=(w < W) & (c < D))
            tl.store(min_ptr + table + c, minimum, mask=(w < W) & (c < D))
            code = _encode(x, scale[None, :], minimum[None, :], (1 << NBITS) - 1)
            words |= tl.where(ok, code, 0) << (f * NBITS)
        row = (packed + g * G + r)[:, None] * W + w[None, :]
        tl.store(word_ptr + row, words.to(tl.int16), mask=(r < G)[:, None] & (w < W)[None, :])


@triton.jit
def _flush_token(
    x_ptr,  # [due, D]: the oldest tokens of one head's residual, rotated where packed tokens are
    word_ptr,  # int16 [T, W]
    scale_ptr,
    min_ptr,  # float16 [T, NC]
    packed,
    due,
    NBITS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    LEAST_SQUARES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """As [`_flush_channel`], for groups that lie in a token. Scales first; then x is read again, from cache."""
    NC: tl.constexpr = (D + G - 1) // G
    r = tl.arange(0, BLOCK_G)
    w = tl.arange(0, BLOCK_W)
    for first in range(0, due, TILE):
        t = first + tl.arange(0, TILE)
        table = (packed + t) * NC
        for g in range(NC):
            c = g * G + r
            ok = (t < due)[:, None] & ((r < G) & (c < D))[None, :]
            x = tl.load(x_ptr + t[:, None] * D + c[None, :], mask=ok, other=0.0).to(tl.float32)
            scale, minimum = _fit(x, ok, 1, (1 << NBITS) - 1, LEAST_SQUARES)
            tl.store(scale_ptr + table + g, scale, mask=t < due)
            tl.store(min_ptr + table + g, minimum, mask=t < due)
        tl.debug_barrier()
        words = tl.zeros([TILE, BLOCK_W], tl.int32)
        for f in tl.static_range(16 // NBITS):
            c = f * W + w
            ok = (t < due)[:, None] & ((w < W) & (c < D))[None, :]
            x = tl.load(x_ptr + t[:, None] * D + c[None, :], mask=ok, other=0.0).to(tl.float32)
            scale = tl.load(scale_ptr + table[:, None] + c[None, :] // G, mask=ok, other=0.0)
            minimum = tl.load(min_ptr + table[:, None] + c[None, :] // G, mask=ok, other=0.0)
            code = _encode(x, scale, minimum, (1 << NBITS) - 1)
            words |= tl.where(ok, code, 0) << (f * NBITS)
        row = (packed + t)[:, None] * W + w[None, :]
        tl.store(word_ptr + row, words.to(tl.int16), mask=(t < due)[:, None] & (w < W)[None, :])


@triton.jit
def _append(
    x_ptr,  # [Q, D]: the new tokens of one head
    stride_xt,
    sink_ptr,  # [S and more, D]
    word_ptr,
    scale_ptr,
    min_ptr,  # as in _flush_channel
    res_ptr,  # [R, D]: the residual of one head
    rotated_ptr,  # float32 [due at most, D]: for the rotated tokens on their way, where ROTATION_BLOCK
    packed,
    target,
    total,
    new,  # how many of the Q rows to store: all, or none
    S: tl.constexpr,
    NBITS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    CHANNEL: tl.constexpr,
    ROTATION_BLOCK: tl.constexpr,
    LEAST_SQUARES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Flush, shift and store for the keys or the values of one head; returns how many are packed now."""
    due = tl.maximum(target - packed, 0)
    c = tl.arange(0, BLOCK_D)
    r = tl.arange(0, TILE)
    due_ptr = res_ptr
    if ROTATION_BLOCK:
        for first in range(0, due, TILE):
            ok = (first + r < due)[:, None] & (c < D)[None, :]
            row = (first + r)[:, None] * D + c[None, :]
            x = tl.load(res_ptr + row, mask=ok, other=0.0).to(tl.float32)
            tl.store(rotated_ptr + row, hadamard_rows(x, ROTATION_BLOCK), mask=ok)
        tl.debug_barrier()
        due_ptr = rotated_ptr
    if CHANNEL:
        _flush_channel(
            due_ptr, word_ptr, scale_ptr, min_ptr, packed, due, NBITS, W, D, G, LEAST_SQUARES, BLOCK_G, BLOCK_W
        )
    else:
        _flush_token(
            due_ptr, word_ptr, scale_ptr, min_ptr, packed, due, NBITS, W, D, G, LEAST_SQUARES, BLOCK_G, BLOCK_W
        )
    tl.debug_barrier()
    # Rows move up in ascending tiles: a barrier on either side, as a row may be another thread's to read.
    left = tl.where(due > 0, total - S - packed - due, 0)
    for first in range(0, left, TILE):
        ok = (first + r < left)[:, None] & (c < D)[None, :]
        row = (first + r)[:, None] * D + c[None, :]
        x = tl.load(res_ptr + due * D + row, mask=ok, other=0.0)
        tl.debug_barrier()
        tl.store(res_ptr + row, x, mask=ok)
        tl.debug_barrier()
    q = tl.arange(0, BLOCK_Q)
    position = total + q
    ok = (q < new)[:, None] & (c < D)[None, :]
    x = tl.load(x_ptr + q[:, None] * stride_xt + c[None, :], mask=ok, other=0.0)
    tl.store(sink_ptr + position[:, None] * D + c[None, :], x, mask=ok & (position < S)[:, None])
    row = position - S - packed - due
    tl.store(res_ptr + row[:, None] * D + c[None, :], x, mask=ok & (position >= S)[:, None])
    return packed + due


@triton.jit
def append_kernel(
    k_ptr,
    v_ptr,  # [B, H, Q, D], last dimension contiguous: the new tokens
    k_sink_ptr,
    v_sink_ptr,  # [B, H, SINK_ROWS, D]; this and all below contiguous
    k_word_ptr,
    v_word_ptr,  # int16 [B, H, T, W]
    k_scale_ptr,
    k_min_ptr,
    v_scale_ptr,
    v_min_ptr,  # float16 [B, H, T / G, D] or [B, H, T, ceil(D / G)]
    k_res_ptr,
    v_res_ptr,  # [B, H, RES_ROWS, D]
    rotated_ptr,  # float32 [2, B, H, FLUSH, D], where ROTATION_BLOCK
    len_ptr,  # int32 [6]: sinks, packed keys, packed values, tokens, steps refused, programs done
    H,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_kw,
    stride_vw,
    stride_km,
    stride_vm,  # from one head to the next, of words and of scales
    CAPACITY,
    Q: tl.constexpr,
    S: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    FLUSH: tl.constexpr,
    SINK_ROWS: tl.constexpr,
    RES_ROWS: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    K_NBITS: tl.constexpr,
    V_NBITS: tl.constexpr,
    K_W: tl.constexpr,
    V_W: tl.constexpr,
    K_CHANNEL: tl.constexpr,
    V_CHANNEL: tl.constexpr,
    ROTATION_BLOCK: tl.constexpr,
    LEAST_SQUARES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_KW: tl.constexpr,
    BLOCK_VW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """A program: the keys (second index 0) or the values (1) of one head."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    n_key = tl.load(len_ptr + 1)
    n_value = tl.load(len_ptr + 2)
    total = tl.load(len_ptr + 3)
    target = tl.maximum(total - S - RESIDUAL, 0) // BLOCK * BLOCK
    new = tl.where(total + Q <= CAPACITY, Q, 0)
    rotated_ptr += (tl.program_id(1) * tl.num_programs(0) + i_bh) * FLUSH * D
    if tl.program_id(1) == 0:
        _append(
            k_ptr + i_b * stride_kb + i_h * stride_kh,
            stride_kt,
            k_sink_ptr + i_bh * SINK_ROWS * D,
            k_word_ptr + i_bh * stride_kw,
            k_scale_ptr + i_bh * stride_km,
            k_min_ptr + i_bh * stride_km,
            k_res_ptr + i_bh * RES_ROWS * D,
            rotated_ptr,
            n_key,
            target,
            total,
            new,
            S,
            K_NBITS,
            K_W,
            D,
            G,
            K_CHANNEL,
            ROTATION_BLOCK,
            LEAST_SQUARES,
            BLOCK_G,
            BLOCK_KW,
            BLOCK_D,
            BLOCK_Q,
        )
    else:
        _append(
            v_ptr + i_b * stride_vb + i_h * stride_vh,
            stride_vt,
            v_sink_ptr + i_bh * SINK_ROWS * D,
            v_word_ptr + i_bh * stride_vw,
            v_scale_ptr + i_bh * stride_vm,
            v_min_ptr + i_bh * stride_vm,
            v_res_ptr + i_bh * RES_ROWS * D,
            rotated_ptr,
            n_value,
            target,
            total,
            new,
            S,
            V_NBITS,
            V_W,
            D,
            G,
            V_CHANNEL,
            ROTATION_BLOCK,
            LEAST_SQUARES,
            BLOCK_G,
            BLOCK_VW,
            BLOCK_D,
            BLOCK_Q,
        )
    # The lengths move on once every program has read them: the last one to come here moves them.
    tl.debug_barrier()
    if tl.atomic_add(len_ptr + 5, 1) == 2 * tl.num_programs(0) - 1:
        after = total + new
        tl.store(len_ptr, tl.minimum(after, S))
        tl.store(len_ptr + 1, tl.maximum(n_key, target))
        tl.store(len_ptr + 2, tl.maximum(n_value, target))
        tl.store(len_ptr + 3, after)
        tl.store(len_ptr + 4, tl.load(len_ptr + 4) + tl.where(new == Q, 0, 1))
        tl.store(len_ptr + 5, 0)


def append(
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    lengths: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    *,
    nbits: tuple[int, ...],
    group_size: int,
    axes: tuple[str, ...],
    rotated: bool,
    least_squares: tuple[float, ...],
    sink_length: int,
    residual_length: int,
    block_length: int,
    flush_length: int,
    max_cache_len: int,
) -> None:
    """Triton twin of ``kivicache.fixed_states.append``.

    Args:
        keys, values: (sinks, residual, words, scale, minimum) of fixed capacity, contiguous, written in place.
        lengths: int32 ``[6]`` on the device: sinks, packed keys, packed values, all tokens, refused steps, 0.
        key_states, value_states: the new tokens, ``[B, H, Q, D]``.
        nbits, group_size, axes: as in ``quantization.quantize``; bits and axes of (keys, values).
        rotated: whether packed tokens are, see [`kivicache.rotation`].
        least_squares: STARTS, NARROWING and ROUNDS of ``backends.mse``; empty: min-max.
        sink_length, residual_length, block_length: of the policy.
        flush_length: the most tokens that can be due at once.
        max_cache_len: tokens beyond it are refused.
    """
    B, H, Q, D = key_states.shape
    key_states, value_states = (x if x.stride(3) == 1 else x.contiguous() for x in (key_states, value_states))
    words = [-(-D * n // 16) for n in nbits]
    # in a captured graph one piece of memory for all layers; any tensor will do where the kernel has no use for it
    turned = lengths
    if rotated:
        turned = torch.empty((2, B, H, flush_length, D), dtype=torch.float32, device=lengths.device)
    append_kernel[(B * H, 2)](
        key_states,
        value_states,
        keys[0],
        values[0],
        keys[2],
        values[2],
        *keys[3:],
        *values[3:],
        keys[1],
        values[1],
        turned,
        lengths,
        H,
        *key_states.stride()[:3],
        *value_states.stride()[:3],
        keys[2].stride(1),
        values[2].stride(1),
        keys[3].stride(1),
        values[3].stride(1),
        max_cache_len,
        Q=Q,
        S=sink_length,
        RESIDUAL=residual_length,
        BLOCK=block_length,
        FLUSH=flush_length,
        SINK_ROWS=keys[0].shape[2],
        RES_ROWS=keys[1].shape[2],
        D=D,
        G=group_size,
        K_NBITS=nbits[0],
        V_NBITS=nbits[1],
        K_W=words[0],
        V_W=words[1],
        K_CHANNEL=axes[0] == "channel",
        V_CHANNEL=axes[1] == "channel",
        ROTATION_BLOCK=rotation_block(D) if rotated else 0,
        LEAST_SQUARES=least_squares,
        BLOCK_G=triton.next_power_of_2(min(group_size, D) if "channel" not in axes else group_size),
        BLOCK_KW=triton.next_power_of_2(words[0]),
        BLOCK_VW=triton.next_power_of_2(words[1]),
        BLOCK_D=triton.next_power_of_2(D),
        BLOCK_Q=triton.next_power_of_2(Q),
        num_warps=4,
    )
