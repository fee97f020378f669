"""Unpack and dequantize: words, scale and minimum back to the dense tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kivicache.triton.tile import dequantize_field, load_table, load_words


@triton.jit
def unpack_kernel(
    word_ptr,  # int16 [B, H, T, W], a token's row contiguous
    scale_ptr,
    min_ptr,  # float16, a head's table contiguous: [B, H, T / G, D] or [B, H, T, ceil(D / G)]
    out_ptr,  # [B, H, T, D], contiguous
    T,
    H,
    stride_wb,
    stride_wh,
    stride_sb,
    stride_sh,
    NBITS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    AXIS_CHANNEL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    w = tl.arange(0, BLOCK_W)
    word_ptr += i_b * stride_wb + i_h * stride_wh
    o_head = i_b * stride_sb + i_h * stride_sh
    words = load_words(word_ptr, t, T, w, W)
    t0 = tl.program_id(0).to(tl.int64) * BLOCK_T
    for f in tl.static_range(16 // NBITS):
        scale = load_table(scale_ptr + o_head, t0, t, T, w, f, W, D, G, AXIS_CHANNEL, BLOCK_T)
        minimum = load_table(min_ptr + o_head, t0, t, T, w, f, W, D, G, AXIS_CHANNEL, BLOCK_T)
        x = dequantize_field(words, scale, minimum, f, NBITS, False)
        c = (f * W + w)[None, :]
        ok = (t < T)[:, None] & (w < W)[None, :] & (c < D)
        tl.store(out_ptr + (i_bh * T + t[:, None]) * D + c, x.to(out_ptr.dtype.element_ty), mask=ok)


def unpack_dequantize(
    words: Tensor,
    scale: Tensor,
    minimum: Tensor,
    nbits: int,
    group_size: int,
    axis: str,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Triton twin of ``dequantize(unpack(words))``.

    Args:
        words: int16 ``[B, H, T, W]``.
        scale, minimum: float16, one per group, of equal strides.
        nbits, group_size, axis: as in ``quantization.quantize``.
        head_dim: D.
        dtype: of the result; computed in float32.

    Returns:
        ``[B, H, T, D]``.
    """
    B, H, T, W = words.shape
    out = torch.empty(B, H, T, head_dim, dtype=dtype, device=words.device)
    block_t = 32
    # a program: 32 tokens of one head
    unpack_kernel[(triton.cdiv(T, block_t), B * H)](
        words,
        scale,
        minimum,
        out,
        T,
        H,
        words.stride(0),
        words.stride(1),
        scale.stride(0),
        scale.stride(1),
        NBITS=nbits,
        W=W,
        D=head_dim,
        G=group_size,
        AXIS_CHANNEL=axis == "channel",
        BLOCK_T=block_t,
        BLOCK_W=triton.next_power_of_2(W),
        num_warps=4,
    )
    return out
