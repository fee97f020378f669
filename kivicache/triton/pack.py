"""Quantize and pack: dense tokens to words, scale and minimum, bit for bit as quantization.quantize + packing.pack."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT16_MAX = tl.constexpr(65504.0)
BLOCK_T = 16  # tokens of a program where groups run along a token


@triton.jit
def _metadata(x):
    """float16 storage of scale and minimum, saturating, NaN kept."""
    x = tl.where(x > FLOAT16_MAX, FLOAT16_MAX, tl.where(x < -FLOAT16_MAX, -FLOAT16_MAX, x))
    return x.to(tl.float16)


@triton.jit
def _group_range(x, ok, dim: tl.constexpr):
    """Minimum and maximum of a group (NaN if it holds one), and whether their difference is finite."""
    nan = tl.max(tl.where(ok & (x != x), 1, 0), dim) > 0
    low = tl.min(tl.where(ok & (x == x), x, float("inf")), dim)
    high = tl.max(tl.where(ok & (x == x), x, -float("inf")), dim)
    low = tl.where(nan, float("nan"), low)
    high = tl.where(nan, float("nan"), high)
    return low, high


@triton.jit
def _scale_minimum(low, high, LEVELS: tl.constexpr):
    span = high - low
    finite = tl.abs(span) <= 3.4028234663852886e38  # neither NaN nor infinite
    scale = _metadata(tl.div_rn(span, tl.full(span.shape, LEVELS, tl.float32)))
    minimum = tl.where(finite, _metadata(low), float("nan")).to(tl.float16)
    return scale, minimum


@triton.jit
def _round_even(x):
    """Round half to even, for 0 <= x < 2**22; larger and NaN unchanged (clamped later)."""
    magic = 8388608.0
    return tl.where((x >= 0) & (x < 4194304.0), (x + magic) - magic, x)


@triton.jit
def _encode(x, scale, minimum, LEVELS: tl.constexpr):
    scale = scale.to(tl.float32)
    scale = tl.where(scale == 0.0, 1.0, scale)
    code = tl.div_rn(x - minimum.to(tl.float32), scale)
    code = _round_even(code)
    code = tl.where(code == code, code, 0.0)
    code = tl.where(code < 0.0, 0.0, tl.where(code > LEVELS, LEVELS * 1.0, code))
    return code.to(tl.int32)


@triton.jit
def pack_channel_kernel(
    x_ptr,  # [B, H, T, D], last dimension contiguous
    word_ptr,  # int16 [B, H, T, W]
    scale_ptr,
    min_ptr,  # float16 [B, H, T / G, D]
    H,
    stride_xb,
    stride_xh,
    stride_xt,
    stride_wb,
    stride_wh,
    stride_wt,
    stride_sb,
    stride_sh,
    NBITS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A program: one group of tokens, BLOCK_W words."""
    i_g = tl.program_id(0).to(tl.int64)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    r = tl.arange(0, BLOCK_G)
    t = i_g * G + r
    x_ptr += i_b * stride_xb + i_h * stride_xh
    o_s = i_b * stride_sb + i_h * stride_sh + i_g * D
    words = tl.zeros([BLOCK_G, BLOCK_W], tl.int32)
    for f in tl.static_range(16 // NBITS):
        c = f * W + w
        ok = (r < G)[:, None] & ((w < W) & (c < D))[None, :]
        x = tl.load(x_ptr + t[:, None] * stride_xt + c[None, :], mask=ok, other=0.0).to(tl.float32)
        low, high = _group_range(x, ok, 0)
        scale, minimum = _scale_minimum(low, high, (1 << NBITS) - 1)
        tl.store(scale_ptr + o_s + c, scale, mask=(w < W) & (c < D))
        tl.store(min_ptr + o_s + c, minimum, mask=(w < W) & (c < D))
        code = _encode(x, scale[None, :], minimum[None, :], (1 << NBITS) - 1)
        words |= tl.where(ok, code, 0) << (f * NBITS)
    o_w = i_b * stride_wb + i_h * stride_wh + t[:, None] * stride_wt + w[None, :]
    tl.store(word_ptr + o_w, words.to(tl.int16), mask=(r < G)[:, None] & (w < W)[None, :])


@triton.jit
def pack_token_kernel(
    x_ptr,  # [B, H, T, D], last dimension contiguous
    word_ptr,  # int16 [B, H, T, W]
    scale_ptr,
    min_ptr,  # float16 [B, H, T, NC]
    T,
    H,
    stride_xb,
    stride_xh,
    stride_xt,
    stride_wb,
    stride_wh,
    stride_wt,
    stride_sb,
    stride_sh,
    NBITS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    NC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A program: BLOCK_T tokens. First all scales and minima, then the words (x is read again, from cache)."""
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    x_ptr += i_b * stride_xb + i_h * stride_xh
    o_s = i_b * stride_sb + i_h * stride_sh + t * NC
    r = tl.arange(0, BLOCK_G)
    for g in range(NC):
        c = g * G + r
        ok = (t < T)[:, None] & ((r < G) & (c < D))[None, :]
        x = tl.load(x_ptr + t[:, None] * stride_xt + c[None, :], mask=ok, other=0.0).to(tl.float32)
        low, high = _group_range(x, ok, 1)
        scale, minimum = _scale_minimum(low, high, (1 << NBITS) - 1)
        tl.store(scale_ptr + o_s + g, scale, mask=t < T)
        tl.store(min_ptr + o_s + g, minimum, mask=t < T)
    tl.debug_barrier()
    w = tl.arange(0, BLOCK_W)
    words = tl.zeros([BLOCK_T, BLOCK_W], tl.int32)
    for f in tl.static_range(16 // NBITS):
        c = f * W + w
        ok = (t < T)[:, None] & ((w < W) & (c < D))[None, :]
        x = tl.load(x_ptr + t[:, None] * stride_xt + c[None, :], mask=ok, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + o_s[:, None] + c[None, :] // G, mask=ok, other=0.0)
        minimum = tl.load(min_ptr + o_s[:, None] + c[None, :] // G, mask=ok, other=0.0)
        code = _encode(x, scale, minimum, (1 << NBITS) - 1)
        words |= tl.where(ok, code, 0) << (f * NBITS)
    o_w = i_b * stride_wb + i_h * stride_wh + t[:, None] * stride_wt + w[None, :]
    tl.store(word_ptr + o_w, words.to(tl.int16), mask=(t < T)[:, None] & (w < W)[None, :])


def quantize_pack(
    states: Tensor,
    nbits: int,
    group_size: int,
    axis: str,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Triton twin of ``pack(quantize(states))``: the very same words, scale and minimum.

    Args:
        states: ``[B, H, T, D]``; ``axis="channel"`` needs group_size to divide T.
        nbits, group_size, axis: as in ``quantization.quantize``.
        out: (words, scale, minimum) to write into, views of a larger store for instance; made when None.

    Returns:
        words int16 ``[B, H, T, W]``; scale, minimum float16.
    """
    B, H, T, D = states.shape
    if states.stride(3) != 1:
        states = states.contiguous()
    W = -(-D * nbits // 16)
    channel = axis == "channel"
    if out is None:
        table = (B, H, T // group_size, D) if channel else (B, H, T, -(-D // group_size))
        out = (
            torch.empty(B, H, T, W, dtype=torch.int16, device=states.device),
            torch.empty(table, dtype=torch.float16, device=states.device),
            torch.empty(table, dtype=torch.float16, device=states.device),
        )
    words, scale, minimum = out
    if T == 0:
        return out
    strides = (*states.stride()[:3], *words.stride()[:3], *scale.stride()[:2])
    if channel:
        block_w = min(32, triton.next_power_of_2(W))
        pack_channel_kernel[(T // group_size, B * H, triton.cdiv(W, block_w))](
            states,
            words,
            scale,
            minimum,
            H,
            *strides,
            NBITS=nbits,
            W=W,
            D=D,
            G=group_size,
            BLOCK_G=triton.next_power_of_2(group_size),
            BLOCK_W=block_w,
            num_warps=4,
        )
    else:
        pack_token_kernel[(triton.cdiv(T, BLOCK_T), B * H)](
            states,
            words,
            scale,
            minimum,
            T,
            H,
            *strides,
            NBITS=nbits,
            W=W,
            D=D,
            G=group_size,
            NC=-(-D // group_size),
            BLOCK_T=BLOCK_T,
            BLOCK_W=triton.next_power_of_2(W),
            BLOCK_G=triton.next_power_of_2(min(group_size, D)),
            num_warps=4,
        )
    return out
