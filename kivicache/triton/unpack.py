"""Unpack and dequantize: words, scale and minimum back to dense tokens, straight into the tensor that wants them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kivicache.triton import tuning


@triton.jit(do_not_specialize=["T"])
def unpack_kernel(
    word_ptr,  # int16 [B, H, T, W], last dimension contiguous
    scale_ptr,
    min_ptr,  # float16, a head's table contiguous: [B, H, ceil(T / G), D] or [B, H, T, ceil(D / G)]
    out_ptr,  # [B, H, T, D], last dimension contiguous
    T,
    H,
    stride_wb,
    stride_wh,
    stride_wt,
    stride_sb,
    stride_sh,
    stride_ob,
    stride_oh,
    stride_ot,
    NBITS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    AXIS_CHANNEL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A program: BLOCK_T tokens; on the channel axis they are of one group."""
    NG: tl.constexpr = (D + G - 1) // G  # groups of a token
    GW: tl.constexpr = min(G, W)  # words of a group within a field, where all sizes are powers of two
    WHOLE: tl.constexpr = W == BLOCK_W and (W % G == 0 or G % W == 0)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    t_first = tl.program_id(0).to(tl.int64) * BLOCK_T
    word_ptr += i_b * stride_wb + i_h * stride_wh + t_first * stride_wt
    out_ptr += i_b * stride_ob + i_h * stride_oh + t_first * stride_ot
    o_group = i_b * stride_sb + i_h * stride_sh + (t_first // G * D if AXIS_CHANNEL else t_first * NG)
    t = tl.arange(0, BLOCK_T)
    w = tl.arange(0, BLOCK_W)
    t_ok = t < T - t_first
    ok = t_ok[:, None] & (w < W)[None, :]
    words = tl.load(word_ptr + t[:, None] * stride_wt + w[None, :], mask=ok, other=0).to(tl.int32)
    tables = ()  # all of them loaded before the first store, which no load could pass
    for f in tl.static_range(16 // NBITS):
        c = f * W + w
        if AXIS_CHANNEL:
            o_f = (o_group + c)[None, :]
            ok_f = ((w < W) & (c < D))[None, :]
        elif WHOLE:
            o_f = o_group + t[:, None] * NG + f * W // G + tl.arange(0, W // GW)[None, :]
            ok_f = t_ok[:, None]
        else:
            o_f = o_group + t[:, None] * NG + (c // G)[None, :]
            ok_f = ok & (c < D)[None, :]
        scale = tl.load(scale_ptr + o_f, mask=ok_f, other=0.0)
        tables = tables + ((scale, tl.load(min_ptr + o_f, mask=ok_f, other=0.0)),)
    for f in tl.static_range(16 // NBITS):
        # The field stays where it is in its word: as the low bits of 2**23 it is a float32 at once, and a power of
        # two in the scale brings it down. Exact, and so is its product with the scale: only the sum is rounded.
        scale = tables[f][0].to(tl.float32) * (1.0 / (1 << (f * NBITS)))
        minimum = tables[f][1].to(tl.float32)
        codes = (words & (((1 << NBITS) - 1) << (f * NBITS))) | 0x4B000000
        codes = codes.to(tl.float32, bitcast=True) - 8388608.0
        if AXIS_CHANNEL or not WHOLE:
            x = codes * scale + minimum
        else:
            x = tl.reshape(codes, [BLOCK_T, W // GW, GW]) * scale[:, :, None] + minimum[:, :, None]
            x = tl.reshape(x, [BLOCK_T, W])
        c = (f * W + w)[None, :]
        tl.store(out_ptr + t[:, None] * stride_ot + c, x.to(out_ptr.dtype.element_ty), mask=ok & (c < D))


def unpack_dequantize(
    words: Tensor, scale: Tensor, minimum: Tensor, nbits: int, group_size: int, axis: str, out: Tensor
) -> None:
    """Triton twin of ``out.copy_(dequantize(unpack(words)))``: the very same numbers.

    Args:
        words: int16 ``[B, H, T, W]``; the first token the first of a group.
        scale, minimum: float16, one per group that the tokens are of. They have the same strides, and every head's
            part of them is contiguous.
        nbits, group_size, axis: as in ``quantization.quantize``.
        out: ``[B, H, T, D]`` of any floating dtype, last dimension contiguous; computed in float32 and rounded once.
    """
    B, H, T, D = out.shape
    if T == 0:
        return
    W = words.shape[3]
    channel = axis == "channel"
    group_size = group_size if channel else min(group_size, D)
    tile = tuning.unpack_tile(nbits, W, group_size if channel else None)
    unpack_kernel[(triton.cdiv(T, tile["BLOCK_T"]), B * H)](
        words,
        scale,
        minimum,
        out,
        T,
        H,
        *words.stride()[:3],
        *scale.stride()[:2],
        *out.stride()[:3],
        NBITS=nbits,
        W=W,
        D=D,
        G=group_size,
        AXIS_CHANNEL=channel,
        **tile,
    )
