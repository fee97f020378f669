"""Device functions that the portable kernels share: they run in Triton's interpreter, on NVIDIA and on AMD.

The bit picture is packing.py's: field j of word w is channel ``j * words + w``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_codes(word_ptr, o_words, ok, f: tl.constexpr, NBITS: tl.constexpr):
    """Field f of the words at ``word_ptr + o_words`` as float32 codes; 0 where not ok."""
    words = tl.load(word_ptr + o_words, mask=ok, other=0).to(tl.int32)
    return ((words >> (f * NBITS)) & ((1 << NBITS) - 1)).to(tl.float32)


@triton.jit
def group_offsets(t, c, D: tl.constexpr, G: tl.constexpr, AXIS_CHANNEL: tl.constexpr):
    """Where the scale and the minimum of token t (first dimension) and channel c (second) lie in their head's table.

    Channel axis: [tokens / G, D]. Token axis: [tokens, ceil(D / G)].
    """
    if AXIS_CHANNEL:
        offsets = (t // G) * D + c
    else:
        offsets = t * ((D + G - 1) // G) + c // G
    return offsets


@triton.jit
def load_packed(
    word_ptr,
    scale_ptr,
    min_ptr,
    t,
    t_stop,
    stride_t,
    w,
    f: tl.constexpr,
    NBITS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    AXIS_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Field f of packed tokens t (int64 [BT]), dequantized: float32 [BT, words]; 0 beyond t_stop, W and D.

    ALIGNED: the tokens are all of one group of the channel axis. A table entry per row or per column is loaded where
    that is all there is; a [tokens, words] tile of addresses into the tables is several times slower.
    """
    c = f * W + w
    t_ok = t < t_stop
    c_ok = (w < W) & (c < D)
    ok = t_ok[:, None] & c_ok[None, :]
    codes = load_codes(word_ptr, t[:, None] * stride_t + w[None, :], ok, f, NBITS)
    if AXIS_CHANNEL and ALIGNED:
        o_group = (tl.min(t, 0) // G) * D + c
        scale = tl.load(scale_ptr + o_group, mask=c_ok, other=0.0).to(tl.float32)[None, :]
        minimum = tl.load(min_ptr + o_group, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    else:
        if (not AXIS_CHANNEL) and (f * W) // G == (f * W + W - 1) // G:
            o_group = t * ((D + G - 1) // G) + (f * W) // G
            scale = tl.load(scale_ptr + o_group, mask=t_ok, other=0.0).to(tl.float32)[:, None]
            minimum = tl.load(min_ptr + o_group, mask=t_ok, other=0.0).to(tl.float32)[:, None]
        else:
            o_group = group_offsets(t[:, None], c[None, :], D, G, AXIS_CHANNEL)
            scale = tl.load(scale_ptr + o_group, mask=ok, other=0.0).to(tl.float32)
            minimum = tl.load(min_ptr + o_group, mask=ok, other=0.0).to(tl.float32)
    return tl.where(ok, codes * scale + minimum, 0.0)


@triton.jit
def load_full(ptr, t, t_stop, stride_t, w, f: tl.constexpr, W: tl.constexpr, D: tl.constexpr):
    """Channels ``f * W + w`` of full-precision tokens t (int64 [BT]): float32 [BT, words]; 0 below token 0, beyond
    t_stop, W and D."""
    c = (f * W + w)[None, :]
    ok = ((t >= 0) & (t < t_stop))[:, None] & (w < W)[None, :] & (c < D)
    return tl.load(ptr + t[:, None] * stride_t + c, mask=ok, other=0.0).to(tl.float32)
