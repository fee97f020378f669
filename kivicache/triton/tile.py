"""Device functions that the portable kernels share: they run in Triton's interpreter, on NVIDIA and on AMD.

The bit picture is packing.py's: field j of word w is channel ``j * words + w``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.jit import constexpr_function


@constexpr_function
def _dequantize_ptx(nbits, f):
    """Two codes at once: field f of two words, each made the float16 1024 + code by its mantissa's bits, less 1024,
    times the scale, plus the minimum."""
    mask = ((1 << nbits) - 1) * 0x10001
    return (
        f"{{ .reg .b32 t, m; mov.b32 m, {0x64006400}; shr.u32 t, $1, {f * nbits}; lop3.b32 t, t, {mask}, m, 0xea; "
        "sub.rn.f16x2 t, t, m; fma.rn.f16x2 $0, t, $2, $3; }"
    )


@triton.jit
def dequantize_field(words, scale, minimum, f: tl.constexpr, NBITS: tl.constexpr, PTX: tl.constexpr):
    """``code * scale + minimum`` of field f of int16 words: float16 where PTX (an NVIDIA GPU), else float32."""
    if PTX:
        scale = tl.broadcast_to(scale, words.shape)
        minimum = tl.broadcast_to(minimum, words.shape)
        x = tl.inline_asm_elementwise(
            _dequantize_ptx(NBITS, f), "=r,r,r,r", [words, scale, minimum], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        codes = (words.to(tl.int32) >> (f * NBITS)) & ((1 << NBITS) - 1)
        x = codes.to(tl.float32) * scale.to(tl.float32) + minimum.to(tl.float32)
    return x


@triton.jit
def load_table(
    ptr,
    t0,
    t,
    t_stop,
    w,
    f: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    AXIS_CHANNEL: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Scale or minimum of field f of tokens t = t0 ... (int64 [BT]), to be broadcast to [BT, words]: float16.

    A head's table is [tokens / G, D] on the channel axis, [tokens, ceil(D / G)] on the token axis. Whole rows or
    columns of it are loaded, one per group that the tile meets, and selected where there are several: a tile of
    addresses into the table is several times slower.
    """
    c = f * W + w
    c_ok = (w < W) & (c < D)
    t_ok = t < t_stop
    if AXIS_CHANNEL:
        ALIGNED: tl.constexpr = G % BLOCK_T == 0  # then a tile, which starts at a multiple of it, lies in one group
        x = tl.load(ptr + (t0 // G) * D + c, mask=c_ok, other=0.0)[None, :]
        if not ALIGNED:
            last = tl.max(tl.where(t_ok, t, 0), 0) // G
            for k in tl.static_range(1, (BLOCK_T - 1) // G + 2):
                g = tl.minimum(t0 // G + k, last)
                row = tl.load(ptr + g * D + c, mask=c_ok, other=0.0)
                x = tl.where((t // G == g)[:, None], row[None, :], x)
    else:
        NC: tl.constexpr = (D + G - 1) // G
        FIRST: tl.constexpr = min(f * W // G, NC - 1)  # a spare field has no channel
        x = tl.load(ptr + t * NC + FIRST, mask=t_ok, other=0.0)[:, None]
        for g in tl.static_range(FIRST + 1, min((f * W + W - 1) // G, NC - 1) + 1):
            column = tl.load(ptr + t * NC + g, mask=t_ok, other=0.0)
            x = tl.where((c // G == g)[None, :], column[:, None], x)
    return x


@triton.jit
def field_channels(w, f: tl.constexpr, W: tl.constexpr, D: tl.constexpr):
    """The channels of field f of words w; D, which no load reads, where w is no word."""
    if w.shape[0] == W:
        c = f * W + w
    else:
        c = tl.where(w < W, f * W + w, D)
    return c


@triton.jit
def load_words(ptr, t, t_stop, w, W: tl.constexpr):
    """The words of tokens t (int64 [BT]): int16 [BT, words]; 0 beyond t_stop and W."""
    ok = (t < t_stop)[:, None] & (w < W)[None, :]
    return tl.load(ptr + t[:, None] * W + w[None, :], mask=ok, other=0)


@triton.jit
def load_full(ptr, t, t_stop, c, D: tl.constexpr):
    """Channels c of full-precision tokens t (int64 [BT]): [BT, channels]; 0 below token 0, beyond t_stop and D."""
    ok = ((t >= 0) & (t < t_stop))[:, None] & (c < D)[None, :]
    return tl.load(ptr + t[:, None] * D + c[None, :], mask=ok, other=0.0)


@triton.jit
def to_dot(x, DOT_TYPE: tl.constexpr):
    """The dot's operand type; what float16 cannot hold becomes the largest that it can, and a NaN stays one."""
    if tl.float16 == DOT_TYPE and x.dtype != tl.float16:
        x = x.to(tl.float32)
        x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    return x.to(DOT_TYPE)
