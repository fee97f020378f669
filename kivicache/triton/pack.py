"""Quantize and pack: dense tokens to words, scale and minimum, bit for bit as quantization.quantize + packing.pack.

A program takes a block of tokens of one head, as packing.py's bit picture has it: one tile [tokens, words] for every
field of the words. All of it is loaded before anything is computed; a thread holds the same words of every field, so
that words come together in registers.

The codes are exact without a division per value. With d = x - minimum and the scale s, a float16 of 11 bits, the code
changes at d / s = k + 1/2. (k + 1/2) * s has at most 20 bits; a float32 d that does not equal it is so far from it
that d / s and k + 1/2 lie more than half a unit in the last place apart, by a margin of at least 2**-36. So rounding
the quotient to float32, as torch does, makes no tie that was none, and any quotient that is rounded once after an
error below that margin gives torch's code. Ours has 2**-42: the remainder of a first try is exact, because s has only
11 bits, and corrects it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kivicache.triton import tuning

FLOAT16_MAX = tl.constexpr(65504.0)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
# A float32 of this size has no fraction: adding it rounds half to even, and the integer stands in the low bits.
MAGIC = tl.constexpr(8388608.0)


@triton.jit
def _join_ranges(low_a, high_a, low_b, high_b):
    """The range that covers two; NaN where one is."""
    low = tl.minimum(low_a, low_b, propagate_nan=tl.PropagateNan.ALL)
    return low, tl.maximum(high_a, high_b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _group_range(x, ok, dim: tl.constexpr):
    """The range of a group's values that are ok."""
    return tl.reduce((tl.where(ok, x, float("inf")), tl.where(ok, x, -float("inf"))), dim, _join_ranges)


@triton.jit
def _bounded(x):
    """The nearest number that float16 can hold; what is rounded to it afterwards is no infinity."""
    return tl.minimum(tl.maximum(x, -FLOAT16_MAX), FLOAT16_MAX)


@triton.jit
def _scale_minimum(low, high, LEVELS: tl.constexpr):
    """float16 scale and minimum of groups from their ends; the minimum is NaN where an end is not finite."""
    span = high - low
    bounded = tl.minimum(span, FLOAT16_MAX * LEVELS, propagate_nan=tl.PropagateNan.ALL)
    inverse: tl.constexpr = 1.0 / LEVELS
    scale = bounded * inverse  # and its remainder: the division of IEEE 754 (Markstein)
    scale = tl.fma(tl.fma(-scale, LEVELS * 1.0, bounded), inverse, scale)
    minimum = tl.where(span <= FLOAT32_MAX, _bounded(low), float("nan"))
    return scale.to(tl.float16), minimum.to(tl.float16)


@triton.jit
def _encode(x, scale, minimum, LEVELS: tl.constexpr):
    """Codes of x in the low 16 bits of int32 (those above are of no use); 0 where the minimum is NaN."""
    scale = scale.to(tl.float32)
    scale = tl.where(scale == 0.0, 1.0, scale)
    inverse = 1.0 / scale
    offset = x - minimum.to(tl.float32)
    code = offset * inverse
    code = tl.fma(tl.fma(-code, scale, offset), inverse, code)
    code = tl.minimum(tl.maximum(code, 0.0), LEVELS * 1.0)  # of a NaN and a number, the number
    return (code + MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def pack_channel_kernel(
    x_ptr,  # [B, H, T, D], last dimension contiguous
    word_ptr,  # int16 [B, H, T, W], last dimension contiguous
    scale_ptr,
    min_ptr,  # float16 [B, H, T / G, D], a head's table contiguous
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
    VECTOR: tl.constexpr,
):
    """A program: one group of tokens, BLOCK_W words of each."""
    LEVELS: tl.constexpr = (1 << NBITS) - 1
    i_g = tl.program_id(0).to(tl.int64)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    x_ptr += i_b * stride_xb + i_h * stride_xh + i_g * G * stride_xt
    word_ptr += i_b * stride_wb + i_h * stride_wh + i_g * G * stride_wt
    o_group = i_b * stride_sb + i_h * stride_sh + i_g * D
    t = tl.minimum(tl.arange(0, BLOCK_G), G - 1)  # the last token over again changes neither end of a group
    w = tl.program_id(2) * BLOCK_W + tl.max_contiguous(tl.arange(0, BLOCK_W), VECTOR)
    fields = ()
    for f in tl.static_range(16 // NBITS):
        c = f * W + w
        ok = ((w < W) & (c < D))[None, :]
        fields = fields + (tl.load(x_ptr + t[:, None] * stride_xt + c[None, :], mask=ok, other=0.0),)
    words = tl.zeros([BLOCK_G, BLOCK_W], tl.int32)
    for f in tl.static_range(16 // NBITS):
        c = f * W + w
        ok = (w < W) & (c < D)
        x = fields[f].to(tl.float32)
        low, high = tl.reduce((x, x), 0, _join_ranges)
        scale, minimum = _scale_minimum(low, high, LEVELS)
        tl.store(scale_ptr + o_group + c, scale, mask=ok)
        tl.store(min_ptr + o_group + c, minimum, mask=ok)
        codes = _encode(x, scale[None, :], minimum[None, :], LEVELS)
        if (f + 1) * W > D:
            codes = tl.where(ok[None, :], codes, 0)
        words += codes << (f * NBITS)
    tl.store(word_ptr + t[:, None] * stride_wt + w[None, :], words.to(tl.int16), mask=(w < W)[None, :])


@triton.jit(do_not_specialize=["T"])
def pack_token_kernel(
    x_ptr,  # [B, H, T, D], last dimension contiguous
    word_ptr,  # int16 [B, H, T, W], last dimension contiguous
    scale_ptr,
    min_ptr,  # float16 [B, H, T, ceil(D / G)], a head's table contiguous
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
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A program: BLOCK_T tokens.

    Where G and the words are powers of two, and so one a multiple of the other, a group is GF fields of GW words, and
    the tiles that are there hold it whole. Else the ranges come from tiles of a group each, x being read twice, and
    the scales reach the fields' tiles through the table.
    """
    LEVELS: tl.constexpr = (1 << NBITS) - 1
    F: tl.constexpr = 16 // NBITS
    NG: tl.constexpr = (D + G - 1) // G
    GF: tl.constexpr = max(G // W, 1)
    GW: tl.constexpr = min(G, W)
    WHOLE: tl.constexpr = W == BLOCK_W and G == BLOCK_G and NG * G == F * W
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    t_first = tl.program_id(0).to(tl.int64) * BLOCK_T
    x_ptr += i_b * stride_xb + i_h * stride_xh + t_first * stride_xt
    word_ptr += i_b * stride_wb + i_h * stride_wh + t_first * stride_wt
    o_group = i_b * stride_sb + i_h * stride_sh + t_first * NG
    t = tl.arange(0, BLOCK_T)
    w = tl.arange(0, BLOCK_W)
    t_ok = t < T - t_first
    ok = t_ok[:, None] & (w < W)[None, :]
    fields = ()
    for f in tl.static_range(F):
        c = (f * W + w)[None, :]
        fields = fields + (tl.load(x_ptr + t[:, None] * stride_xt + c, mask=ok & (c < D), other=0.0),)
    if not WHOLE:
        r = tl.arange(0, BLOCK_G)
        for g in tl.static_range(NG):
            c = g * G + r
            ok_g = t_ok[:, None] & ((r < G) & (c < D))[None, :]
            x = tl.load(x_ptr + t[:, None] * stride_xt + c[None, :], mask=ok_g, other=0.0).to(tl.float32)
            low, high = _group_range(x, ok_g, 1)
            scale, minimum = _scale_minimum(low, high, LEVELS)
            tl.store(scale_ptr + o_group + t * NG + g, scale, mask=t_ok)
            tl.store(min_ptr + o_group + t * NG + g, minimum, mask=t_ok)
        tl.debug_barrier()
    words = tl.zeros([BLOCK_T, BLOCK_W], tl.int32)
    for f in tl.static_range(F):
        x = fields[f].to(tl.float32)
        c = (f * W + w)[None, :]
        if WHOLE:
            if f % GF == 0:
                low, high = x, x
                for other in tl.static_range(f + 1, f + GF):
                    low, high = _join_ranges(low, high, fields[other].to(tl.float32), fields[other].to(tl.float32))
                low, high = tl.reshape(low, [BLOCK_T, W // GW, GW]), tl.reshape(high, [BLOCK_T, W // GW, GW])
                low, high = tl.reduce((low, high), 2, _join_ranges)
                scale, minimum = _scale_minimum(low, high, LEVELS)
                o_g = o_group + t[:, None] * NG + f * W // G + tl.arange(0, W // GW)[None, :]
                tl.store(scale_ptr + o_g, scale, mask=t_ok[:, None])
                tl.store(min_ptr + o_g, minimum, mask=t_ok[:, None])
            x = tl.reshape(x, [BLOCK_T, W // GW, GW])
            codes = tl.reshape(_encode(x, scale[:, :, None], minimum[:, :, None], LEVELS), [BLOCK_T, W])
        else:
            ok_f = ok & (c < D)
            scale = tl.load(scale_ptr + o_group + t[:, None] * NG + c // G, mask=ok_f, other=0.0)
            minimum = tl.load(min_ptr + o_group + t[:, None] * NG + c // G, mask=ok_f, other=0.0)
            codes = tl.where(ok_f, _encode(x, scale, minimum, LEVELS), 0)
        words += codes << (f * NBITS)
    tl.store(word_ptr + t[:, None] * stride_wt + w[None, :], words.to(tl.int16), mask=ok)


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
        out: (words, scale, minimum) to write into, views of a larger store for instance; made when None. Scale and
            minimum have the same strides, and every head's part of them is contiguous.

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
    sizes = {"NBITS": nbits, "W": W, "D": D}
    if channel:
        tile = tuning.pack_channel_tile(nbits, W, group_size)
        grid = (T // group_size, B * H, triton.cdiv(W, tile["BLOCK_W"]))
        pack_channel_kernel[grid](states, words, scale, minimum, H, *strides, **sizes, G=group_size, **tile)
    else:
        group_size = min(group_size, D)
        tile = tuning.pack_token_tile(nbits, W, group_size)
        grid = (triton.cdiv(T, tile["BLOCK_T"]), B * H)
        pack_token_kernel[grid](states, words, scale, minimum, T, H, *strides, **sizes, G=group_size, **tile)
    return out
