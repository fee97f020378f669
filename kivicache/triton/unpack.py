"""Unpack and dequantize: words, scale and minimum back to dense tokens, straight into the tensor that wants them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kivicache.triton import tuning
from kivicache.triton.tile import dequantize_field, load_table, load_words


@triton.jit(do_not_specialize=["T"])
def unpack_kernel(
    word_ptr,  # int16 [B, H, T, W], a token's row contiguous
    scale_ptr,
    min_ptr,  # float16, a head's table contiguous: [B, H, ceil(T / G), D] or [B, H, T, ceil(D / G)]
    out_ptr,  # [B, H, T, D], last dimension contiguous
    T,
    H,
    stride_wb,
    stride_wh,
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
    F: tl.constexpr = 16 // NBITS
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    t_first = tl.program_id(0).to(tl.int64) * BLOCK_T
    out_ptr += i_b * stride_ob + i_h * stride_oh + t_first * stride_ot
    o_table = i_b * stride_sb + i_h * stride_sh + (t_first // G * D if AXIS_CHANNEL else t_first * NG)
    # from here on tokens count from t_first, in 32 bits
    t = tl.arange(0, BLOCK_T)
    t_stop = (T - t_first).to(tl.int32)
    w = tl.arange(0, BLOCK_W)
    words = load_words(word_ptr + i_b * stride_wb + i_h * stride_wh + t_first * W, t, t_stop, w, W)
    tables = ()  # all of them loaded before the first store, which no load could pass
    for f in tl.static_range(F):
        scale = load_table(scale_ptr + o_table, 0, t, t_stop, w, f, W, D, G, AXIS_CHANNEL, BLOCK_T)
        minimum = load_table(min_ptr + o_table, 0, t, t_stop, w, f, W, D, G, AXIS_CHANNEL, BLOCK_T)
        tables = tables + ((scale, minimum),)
    for f in tl.static_range(F):
        x = dequantize_field(words, tables[f][0], tables[f][1], f, NBITS, False)
        c = (f * W + w)[None, :]
        ok = (t < t_stop)[:, None] & (w < W)[None, :] & (c < D)
        tl.store(out_ptr + t[:, None] * stride_ot + c, x.to(out_ptr.dtype.element_ty), mask=ok)


def unpack_dequantize(
    words: Tensor, scale: Tensor, minimum: Tensor, nbits: int, group_size: int, axis: str, out: Tensor
) -> None:
    """Triton twin of ``out.copy_(dequantize(unpack(words)))``: the very same numbers.

    Args:
        words: int16 ``[B, H, T, W]``, a head's part contiguous; the first token the first of a group.
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
        *words.stride()[:2],
        *scale.stride()[:2],
        *out.stride()[:3],
        NBITS=nbits,
        W=W,
        D=D,
        G=group_size,
        AXIS_CHANNEL=channel,
        **tile,
    )
