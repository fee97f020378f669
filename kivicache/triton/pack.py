"""Quantize and pack: dense tokens to words, scale and minimum, bit for bit as quantization.quantize + packing.pack.

Both kernels load their tokens once, as [tokens, fields, words]: field f of word w is channel ``f * words + w``, so a
token's row is read in order, 16 bytes a thread, and packing is a sum over the fields.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT16_MAX = tl.constexpr(65504.0)
BLOCK_T = 16  # tokens of a program of the token kernel: 16 values a thread at head_dim 128


@triton.jit
def _metadata(x):
    """float16 storage of scale and minimum, saturating, NaN kept."""
    x = tl.where(x > FLOAT16_MAX, FLOAT16_MAX, tl.where(x < -FLOAT16_MAX, -FLOAT16_MAX, x))
    return x.to(tl.float16)


@triton.jit
def _scale_minimum(low, high, nan, LEVELS: tl.constexpr):
    """A group's scale and minimum, float16; NaN where it holds a NaN or an infinity."""
    span = tl.where(nan, float("nan"), high - low)
    finite = tl.abs(span) <= 3.4028234663852886e38  # neither NaN nor infinite
    scale = _metadata(tl.div_rn(span, tl.full(span.shape, LEVELS, tl.float32)))
    minimum = tl.where(finite, _metadata(low), float("nan")).to(tl.float16)
    return scale, minimum


@triton.jit
def _reciprocal(scale):
    """(scale, its reciprocal) in float32, as _encode wants them; a constant group's scale 0 counts as 1."""
    scale = scale.to(tl.float32)
    scale = tl.where(scale == 0.0, 1.0, scale)
    return scale, 1.0 / scale


@triton.jit
def _encode(x, scale, reciprocal, minimum, LEVELS: tl.constexpr):
    """clamp(round_half_even((x - minimum) / scale), 0, LEVELS), NaN as 0, without a division per value.

    The code is one of two neighbours, k and k + 1, and (k + 1/2) * scale decides: with scale's 11 bits it is exact in
    float32, and the rounded quotient is k + 1/2 only where x - minimum is exactly that.
    """
    above = x - minimum.to(tl.float32)
    # the sum with 2**23 - 1/2 has no room for a fraction: floor of the quotient, or at a whole number its neighbour
    shifted = above * reciprocal + 8388607.5
    shifted = tl.where(shifted > 8388608.0, shifted, 8388608.0)
    shifted = tl.where(shifted < 8388608.0 + (LEVELS - 1), shifted, 8388608.0 + (LEVELS - 1))
    lower = shifted - 8388608.0
    middle = lower * scale + 0.5 * scale
    code = shifted.to(tl.int32, bitcast=True) & 255
    odd = (code & 1) != 0
    return code + tl.where((above > middle) | ((above == middle) & odd), 1, 0)


@triton.jit
def _to_words(code, NBITS: tl.constexpr):
    """Codes int32 [tokens, fields, words] to words int16 [tokens, words].

    Two neighbouring words travel as one number through the sum, which halves its exchange between threads.
    """
    T: tl.constexpr = code.shape[0]
    F: tl.constexpr = code.shape[1]
    W: tl.constexpr = code.shape[2]
    shifted = code << (tl.arange(0, F) * NBITS)[None, :, None]
    even, odd = tl.split(tl.reshape(shifted, [T, F, W // 2, 2]))
    pair = tl.sum(even | (odd << 16), 1)
    return tl.reshape(tl.join(pair & 65535, (pair >> 16) & 65535), [T, W]).to(tl.int16)


@triton.jit
def pack_channel_kernel(
    x_ptr,  # [B, H, T, D], last dimension contiguous
    word_ptr,  # int16 [B, H, T, W]
    scale_ptr,  # float16 [B, H, T / G, D]
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
    """A program: one group of tokens, BLOCK_W words of each."""
    LEVELS: tl.constexpr = (1 << NBITS) - 1
    i_g = tl.program_id(0).to(tl.int64)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    r = tl.arange(0, BLOCK_G)
    t = i_g * G + r
    c = (tl.arange(0, 16 // NBITS) * W)[:, None] + w[None, :]
    c_ok = (w < W)[None, :] & (c < D)
    ok = (r < G)[:, None, None] & c_ok[None, :, :]
    x_ptr += i_b * stride_xb + i_h * stride_xh
    x = tl.load(x_ptr + t[:, None, None] * stride_xt + c[None, :, :], mask=ok, other=0.0).to(tl.float32)
    if BLOCK_G == G:  # spare channels have their own, unused minimum
        low = tl.min(x, 0)
        high = tl.max(x, 0)
    else:
        low = tl.min(tl.where(ok, x, float("inf")), 0)
        high = tl.max(tl.where(ok, x, -float("inf")), 0)
    nan = tl.max(tl.where(x == x, 0, 1), 0) != 0
    scale, minimum = _scale_minimum(low, high, nan, LEVELS)
    o_s = i_b * stride_sb + i_h * stride_sh + i_g * D
    tl.store(scale_ptr + o_s + c, scale, mask=c_ok)
    tl.store(min_ptr + o_s + c, minimum, mask=c_ok)
    scale, reciprocal = _reciprocal(scale)
    code = _encode(x, scale[None, :, :], reciprocal[None, :, :], minimum[None, :, :], LEVELS)
    if (16 // NBITS) * W != D:  # spare fields of the last words are zero
        code = tl.where((c < D)[None, :, :], code, 0)
    words = _to_words(code, NBITS)
    o_w = i_b * stride_wb + i_h * stride_wh + t[:, None] * stride_wt + w[None, :]
    tl.store(word_ptr + o_w, words, mask=(r < G)[:, None] & (w < W)[None, :])


@triton.jit
def _store_token_groups(scale_ptr, min_ptr, offsets, scale, minimum, mask):
    tl.store(scale_ptr + offsets, scale, mask=mask)
    tl.store(min_ptr + offsets, minimum, mask=mask)


@triton.jit
def pack_token_kernel(
    x_ptr,  # [B, H, T, D], last dimension contiguous
    word_ptr,  # int16 [B, H, T, W]
    scale_ptr,  # float16 [B, H, T, NC]
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
    EVEN: tl.constexpr,  # D and G are powers of two: a row splits into groups as evenly as into fields
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A program: BLOCK_T tokens."""
    LEVELS: tl.constexpr = (1 << NBITS) - 1
    FIELDS: tl.constexpr = 16 // NBITS
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_ok = t < T
    w = tl.arange(0, BLOCK_W)
    x_ptr += i_b * stride_xb + i_h * stride_xh
    o_s = i_b * stride_sb + i_h * stride_sh + t * NC
    if EVEN:
        c = tl.arange(0, D)
        x = tl.load(x_ptr + t[:, None] * stride_xt + c[None, :], mask=t_ok[:, None], other=0.0).to(tl.float32)
        x = tl.reshape(x, [BLOCK_T, NC, G])
        nan = tl.max(tl.where(x == x, 0, 1), 2) != 0
        scale, minimum = _scale_minimum(tl.min(x, 2), tl.max(x, 2), nan, LEVELS)
        o_g = o_s[:, None] + tl.arange(0, NC)[None, :]
        _store_token_groups(scale_ptr, min_ptr, o_g, scale, minimum, t_ok[:, None])
        scale, reciprocal = _reciprocal(scale)
        code = _encode(x, scale[:, :, None], reciprocal[:, :, None], minimum[:, :, None], LEVELS)
        code = tl.reshape(code, [BLOCK_T, FIELDS, W])
    else:
        c = (tl.arange(0, FIELDS) * W)[:, None] + w[None, :]
        ok = t_ok[:, None, None] & ((w < W)[None, :] & (c < D))[None, :, :]
        x = tl.load(x_ptr + t[:, None, None] * stride_xt + c[None, :, :], mask=ok, other=0.0).to(tl.float32)
        ROW: tl.constexpr = FIELDS * BLOCK_W
        x = tl.reshape(x, [BLOCK_T, ROW])
        ok = tl.reshape(ok, [BLOCK_T, ROW])
        group = tl.reshape(tl.broadcast_to((c // G)[None, :, :], [BLOCK_T, FIELDS, BLOCK_W]), [BLOCK_T, ROW])
        code = tl.zeros([BLOCK_T, ROW], tl.int32)
        for g in tl.static_range(NC):
            here = ok & (group == g)
            low = tl.min(tl.where(here, x, float("inf")), 1)
            high = tl.max(tl.where(here, x, -float("inf")), 1)
            nan = tl.max(tl.where(here & (x != x), 1, 0), 1) != 0
            scale, minimum = _scale_minimum(low, high, nan, LEVELS)
            _store_token_groups(scale_ptr, min_ptr, o_s + g, scale, minimum, t_ok)
            scale, reciprocal = _reciprocal(scale)
            encoded = _encode(x, scale[:, None], reciprocal[:, None], minimum[:, None], LEVELS)
            code = tl.where(here, encoded, code)
        code = tl.reshape(code, [BLOCK_T, FIELDS, BLOCK_W])
    o_w = i_b * stride_wb + i_h * stride_wh + t[:, None] * stride_wt + w[None, :]
    tl.store(word_ptr + o_w, _to_words(code, NBITS), mask=t_ok[:, None] & (w < W)[None, :])


def quantize_pack(
    states: Tensor, nbits: int, group_size: int, axis: str, out: tuple[Tensor, Tensor, Tensor] | None = None
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
    W = -(-D * nbits // 16)
    channel = axis == "channel"
    if states.stride(3) != 1:
        states = states.contiguous()
    if out is None:
        table = (B, H, T // group_size, D) if channel else (B, H, T, -(-D // group_size))
        out = (
            torch.empty(B, H, T, W, dtype=torch.int16, device=states.device),
            torch.empty(table, dtype=torch.float16, device=states.device),
            torch.empty(table, dtype=torch.float16, device=states.device),
        )
    words, scale, minimum = out
    if not states.numel():
        return out
    strides = (*states.stride()[:3], *words.stride()[:3], *scale.stride()[:2])
    block_w = max(2, triton.next_power_of_2(W))
    if channel:
        block_g = triton.next_power_of_2(group_size)
        # at 8 warps, 64 values a thread
        while block_w > 8 and block_g * block_w * (16 // nbits) > 16384:
            block_w //= 2
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
            BLOCK_G=block_g,
            BLOCK_W=block_w,
            num_warps=4 if block_g * block_w * (16 // nbits) <= 4096 else 8,
        )
    else:
        G = min(group_size, D)
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
            G=G,
            NC=triton.cdiv(D, G),
            EVEN=D >= 16 and triton.next_power_of_2(D) == D and triton.next_power_of_2(G) == G,
            BLOCK_T=BLOCK_T,
            BLOCK_W=block_w,
            num_warps=4,
        )
    return out
