"""The portable decode attention: every format, in plain Triton; the readable twin, and what the interpreter runs.

On NVIDIA GPUs decode_nvidia.py, much faster, serves the common formats.

Tokens lie in this order: the sinks, the packed ones, the newest ones. Keys and values may stop being packed at
different tokens. The kernel walks tiles of BLOCK_T tokens in which each tensor is of one kind, so there are four runs
of tiles: sinks; newest, in full precision in both; packed in one of both; packed in both.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kivicache.buffer import TokenBuffer
from kivicache.triton.launch import Launcher
from kivicache.triton.operands import Call, Pair
from kivicache.triton.tile import dequantize_field, field_channels, load_full, load_table, load_words, to_dot
from kivicache.triton.tuning import portable_block, portable_warps


@triton.jit
def _query(q_ptr, row, n_ok, c, D: tl.constexpr):
    """Channels c of the query rows: [rows, channels], 0 beyond D."""
    return tl.load(q_ptr + row[:, None] * D + c[None, :], mask=n_ok[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def _packed_tile(
    word_ptr,
    words,
    scale_ptr,
    min_ptr,
    t0,
    t,
    t_stop,
    w,
    f: tl.constexpr,
    NBITS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    AXIS_CHANNEL: tl.constexpr,
    PTX: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Field f of packed tokens, ready for a dot: [BT, words]. 16 bits are one field, the tokens themselves."""
    if NBITS == 16:
        x = load_full(word_ptr, t, t_stop, w, D)
    else:
        scale = load_table(scale_ptr, t0, t, t_stop, w, f, W, D, G, AXIS_CHANNEL, BLOCK_T)
        minimum = load_table(min_ptr, t0, t, t_stop, w, f, W, D, G, AXIS_CHANNEL, BLOCK_T)
        x = dequantize_field(words, scale, minimum, f, NBITS, PTX)
    return to_dot(x, DOT_TYPE)


@triton.jit
def _query_fields(q_ptr, row, n_ok, w, NBITS: tl.constexpr, W: tl.constexpr, D: tl.constexpr, DOT_TYPE: tl.constexpr):
    """The query as the fields of packed keys meet it: a tuple of [rows, words]."""
    fields = ()
    for f in tl.static_range(16 // NBITS):
        fields = fields + (to_dot(_query(q_ptr, row, n_ok, field_channels(w, f, W, D), D), DOT_TYPE),)
    return fields


@triton.jit
def _scores_packed(
    q,
    word_ptr,
    scale_ptr,
    min_ptr,
    t0,
    t,
    t_stop,
    w,
    NBITS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    AXIS_CHANNEL: tl.constexpr,
    PTX: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Raw scores of packed keys t0 ... (t, below t_stop): float32 [rows, BT]."""
    s = tl.zeros([q[0].shape[0], BLOCK_T], tl.float32)
    words = t
    if NBITS < 16:
        words = load_words(word_ptr, t, t_stop, w, W)
    for f in tl.static_range(16 // NBITS):
        k = _packed_tile(
            word_ptr,
            words,
            scale_ptr,
            min_ptr,
            t0,
            t,
            t_stop,
            w,
            f,
            NBITS,
            W,
            D,
            G,
            AXIS_CHANNEL,
            PTX,
            DOT_TYPE,
            BLOCK_T,
        )
        s = tl.dot(q[f], tl.trans(k), s, input_precision="ieee")
    return s


@triton.jit
def _add_packed(
    acc,
    alpha,
    p,
    word_ptr,
    scale_ptr,
    min_ptr,
    t0,
    t,
    t_stop,
    w,
    NBITS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    AXIS_CHANNEL: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """acc * alpha + p . packed values t0 ... (t, below t_stop), field by field."""
    new = ()
    words = t
    if NBITS < 16:
        words = load_words(word_ptr, t, t_stop, w, W)
    for f in tl.static_range(16 // NBITS):
        v = _packed_tile(
            word_ptr,
            words,
            scale_ptr,
            min_ptr,
            t0,
            t,
            t_stop,
            w,
            f,
            NBITS,
            W,
            D,
            G,
            AXIS_CHANNEL,
            PTX,
            p.dtype,
            BLOCK_T,
        )
        new = new + (tl.dot(p, v, acc[f] * alpha[:, None], input_precision="ieee"),)
    return new


@triton.jit
def _add_full(acc, alpha, p, ptr, t, t_stop, w, FIELDS: tl.constexpr, W: tl.constexpr, D: tl.constexpr):
    """acc * alpha + p . full-precision values, field by field."""
    new = ()
    for f in tl.static_range(FIELDS):
        v = to_dot(load_full(ptr, t, t_stop, field_channels(w, f, W, D), D), p.dtype)
        new = new + (tl.dot(p, v, acc[f] * alpha[:, None], input_precision="ieee"),)
    return new


@triton.jit
def _finish_scores(
    s, n_ok, t, start, stop, mask_row, stride_mt, scale, cap, MASK: tl.constexpr, SOFTCAP: tl.constexpr
):
    """Scale, soft cap, the caller's mask and the tile's own ends, on raw scores [rows, BT]: in base 2."""
    LOG2E_: tl.constexpr = 1.4426950408889634
    s *= scale
    if SOFTCAP:
        s = cap * LOG2E_ * (1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 / cap))))
    if MASK != 0:
        x = tl.load(
            mask_row[:, None] + t.to(tl.int64)[None, :] * stride_mt,
            mask=n_ok[:, None] & (t < stop)[None, :],
            other=0,
        )
        if MASK == 1:
            s = tl.where(x != 0, s, -float("inf"))
        else:
            s += x.to(tl.float32) * LOG2E_
    return tl.where(((t >= start) & (t < stop))[None, :], s, -float("inf"))


@triton.jit
def _softmax_step(s, m, l):
    """One more tile of base-2 scores: weights, and the running maximum, sum and factor of what came before."""
    m_new = tl.maximum(m, tl.max(s, 1))
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s - m_new[:, None])
    return p, m_new, l * alpha + tl.sum(p, 1), alpha


@triton.jit(
    do_not_specialize=[
        "n_sink",
        "n_key",
        "n_value",
        "n_total",
        "n_exact",
        "H",
        "HEADS",
        "stride_mb",
        "stride_mh",
        "stride_mq",
        "stride_mt",
    ],
    do_not_specialize_on_alignment=["mask_ptr", "len_ptr", "head_ptr", "lse_ptr"],
)
def decode_kernel(
    q_ptr,  # [B, HEADS, ROWS, DK]: the query heads of a key head, each with its Q query tokens, are its rows
    q_packed_ptr,  # the same for packed keys: rotated where they are
    k_word_ptr,
    v_word_ptr,  # int16 [B, heads, T, W], or [B, heads, T, D] of q's dtype for 16 bits
    k_scale_ptr,
    k_min_ptr,
    v_scale_ptr,
    v_min_ptr,  # float16 [B, heads, T / G, D] or [B, heads, T, ceil(D / G)]
    k_sink_ptr,
    v_sink_ptr,
    k_new_ptr,
    v_new_ptr,  # [B, HEADS, tokens, DK], [B, HEADS, tokens, DV]
    mask_ptr,  # bool as uint8, or additive: [B, 1 or query heads, Q, positions]
    len_ptr,  # int32: n_sink, n_key, n_value, n_total, .., when LENGTHS_ON_DEVICE
    head_ptr,  # int32 [3, H], when MIXED: the key head, and where it lies in the stores of keys and of values
    o_ptr,
    lse_ptr,  # float32 [B * HEADS, splits, ROWS, DV], [B * HEADS, splits, ROWS]
    n_sink,
    n_key,
    n_value,
    n_total,
    n_exact,  # when ROTATED: the first splits, for the values that are not rotated
    scale,
    cap,
    H,
    HEADS,
    stride_kwb,
    stride_kwh,
    stride_vwb,
    stride_vwh,
    stride_kmb,
    stride_kmh,
    stride_vmb,
    stride_vmh,
    stride_ksb,
    stride_ksh,
    stride_vsb,
    stride_vsh,
    stride_knb,
    stride_knh,
    stride_vnb,
    stride_vnh,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mt,
    ROWS: tl.constexpr,
    Q: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    G_K: tl.constexpr,
    G_V: tl.constexpr,
    K_NBITS: tl.constexpr,
    V_NBITS: tl.constexpr,
    K_CHANNEL: tl.constexpr,
    V_CHANNEL: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LENGTHS_ON_DEVICE: tl.constexpr,
    MIXED: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_KW: tl.constexpr,
    BLOCK_VW: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    V_FIELDS: tl.constexpr = 16 // V_NBITS
    K_W: tl.constexpr = (DK * K_NBITS + 15) // 16
    V_W: tl.constexpr = (DV * V_NBITS + 15) // 16
    i_s = tl.program_id(0)
    n_s = tl.num_programs(0)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    h_k = h
    h_v = h
    if MIXED:
        h_k = tl.load(head_ptr + H + h).to(tl.int64)
        h_v = tl.load(head_ptr + 2 * H + h).to(tl.int64)
        h = tl.load(head_ptr + h).to(tl.int64)
    if LENGTHS_ON_DEVICE:
        n_sink = tl.load(len_ptr)
        n_key = tl.load(len_ptr + 1)
        n_value = tl.load(len_ptr + 2)
        n_total = tl.load(len_ptr + 3)
    k_word_ptr += i_b * stride_kwb + h_k * stride_kwh
    v_word_ptr += i_b * stride_vwb + h_v * stride_vwh
    k_scale_ptr += i_b * stride_kmb + h_k * stride_kmh
    k_min_ptr += i_b * stride_kmb + h_k * stride_kmh
    v_scale_ptr += i_b * stride_vmb + h_v * stride_vmh
    v_min_ptr += i_b * stride_vmb + h_v * stride_vmh
    k_sink_ptr += i_b * stride_ksb + h * stride_ksh
    v_sink_ptr += i_b * stride_vsb + h * stride_vsh
    k_new_ptr += i_b * stride_knb + h * stride_knh
    v_new_ptr += i_b * stride_vnb + h * stride_vnh

    i_bh = i_b * HEADS + h
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < ROWS
    q_row = i_bh * ROWS + n
    mask_row = mask_ptr + i_b * stride_mb + (h * (ROWS // Q) + n // Q) * stride_mh + (n % Q) * stride_mq
    k_w = tl.arange(0, BLOCK_KW)
    v_w = tl.arange(0, BLOCK_VW)
    c_k = tl.arange(0, BLOCK_DK)

    # Tiles in this order: sinks, newest, those where only one of keys and values is packed (such a run starts at a
    # tile's boundary, and the tokens it shares with the packed run are masked), and the packed ones.
    n_both = tl.minimum(n_key, n_value)
    n_one = tl.maximum(n_key, n_value)
    one_first = n_both // BLOCK_T * BLOCK_T
    tiles_sink = (n_sink + BLOCK_T - 1) // BLOCK_T
    tiles_new = tiles_sink + (n_total - n_sink - n_one + BLOCK_T - 1) // BLOCK_T
    tiles_edge = tiles_new + tl.where(n_one > n_both, (n_one - one_first + BLOCK_T - 1) // BLOCK_T, 0)
    tiles = tiles_edge + (n_both + BLOCK_T - 1) // BLOCK_T
    if ROTATED:  # a split holds rotated values or others, never both: the merge turns back the sum of the former
        tiles_exact = tl.where(n_value > n_key, tiles_new, tiles_edge)
        if i_s < n_exact:
            share = (tiles_exact + n_exact - 1) // n_exact
            i_first = tl.minimum(i_s * share, tiles_exact)
            i_last = tl.minimum(i_first + share, tiles_exact)
        else:
            share = (tiles - tiles_exact + n_s - n_exact - 1) // (n_s - n_exact)
            i_first = tl.minimum(tiles_exact + (i_s - n_exact) * share, tiles)
            i_last = tl.minimum(i_first + share, tiles)
    else:
        share = (tiles + n_s - 1) // n_s
        i_first = tl.minimum(i_s * share, tiles)
        i_last = tl.minimum(i_first + share, tiles)

    m = tl.full([BLOCK_N], -1e30, tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)
    acc = ()
    for _ in tl.static_range(V_FIELDS):
        acc = acc + (tl.zeros([BLOCK_N, BLOCK_VW], tl.float32),)

    for i in range(i_first, tl.minimum(i_last, tiles_edge)):
        start = 0
        if i < tiles_sink:
            first = i * BLOCK_T
            stop = n_sink
        else:
            if i < tiles_new:
                first = n_sink + n_one + (i - tiles_sink) * BLOCK_T
                stop = n_total
            else:
                first = n_sink + one_first + (i - tiles_new) * BLOCK_T
                stop = n_sink + n_one
                start = n_sink + n_both
        t = first + tl.arange(0, BLOCK_T)
        t64 = t.to(tl.int64)
        if (first >= n_sink) & (stop <= n_sink + n_key):
            q = _query_fields(q_packed_ptr, q_row, n_ok, k_w, K_NBITS, K_W, DK, DOT_TYPE)
            s = _scores_packed(
                q, k_word_ptr, k_scale_ptr, k_min_ptr, first - n_sink, t64 - n_sink, stop - n_sink, k_w,
                K_NBITS, K_W, DK, G_K, K_CHANNEL, PTX, DOT_TYPE, BLOCK_T,
            )  # fmt: skip
        else:
            if first < n_sink:
                k = load_full(k_sink_ptr, t64, stop, c_k, DK)
            else:
                k = load_full(k_new_ptr, t64 - n_sink - n_key, stop - n_sink - n_key, c_k, DK)
            q_full = to_dot(_query(q_ptr, q_row, n_ok, c_k, DK), DOT_TYPE)
            s = tl.dot(q_full, tl.trans(to_dot(k, DOT_TYPE)), input_precision="ieee")
        s = _finish_scores(s, n_ok, t, start, stop, mask_row, stride_mt, scale, cap, MASK, SOFTCAP)
        p, m, l, alpha = _softmax_step(s, m, l)
        p = p.to(DOT_TYPE)
        if first < n_sink:
            acc = _add_full(acc, alpha, p, v_sink_ptr, t64, stop, v_w, V_FIELDS, V_W, DV)
        else:
            if stop <= n_sink + n_value:
                acc = _add_packed(
                    acc, alpha, p, v_word_ptr, v_scale_ptr, v_min_ptr, first - n_sink, t64 - n_sink, stop - n_sink,
                    v_w, V_NBITS, V_W, DV, G_V, V_CHANNEL, PTX, BLOCK_T,
                )  # fmt: skip
            else:
                t_new = t64 - n_sink - n_value
                acc = _add_full(
                    acc, alpha, p, v_new_ptr, t_new, stop - n_sink - n_value, v_w, V_FIELDS, V_W, DV
                )  # fmt: skip

    q = _query_fields(q_packed_ptr, q_row, n_ok, k_w, K_NBITS, K_W, DK, DOT_TYPE)
    for i in range(tl.maximum(i_first, tiles_edge) - tiles_edge, tl.maximum(i_last, tiles_edge) - tiles_edge):
        first = i * BLOCK_T
        t = first + tl.arange(0, BLOCK_T)
        t64 = t.to(tl.int64)
        s = _scores_packed(
            q, k_word_ptr, k_scale_ptr, k_min_ptr, first, t64, n_both, k_w,
            K_NBITS, K_W, DK, G_K, K_CHANNEL, PTX, DOT_TYPE, BLOCK_T,
        )  # fmt: skip
        s = _finish_scores(s, n_ok, n_sink + t, 0, n_sink + n_both, mask_row, stride_mt, scale, cap, MASK, SOFTCAP)
        p, m, l, alpha = _softmax_step(s, m, l)
        acc = _add_packed(
            acc, alpha, p.to(DOT_TYPE), v_word_ptr, v_scale_ptr, v_min_ptr, first, t64, n_both, v_w,
            V_NBITS, V_W, DV, G_V, V_CHANNEL, PTX, BLOCK_T,
        )  # fmt: skip

    row = (i_bh * n_s + i_s) * ROWS + n
    tl.store(lse_ptr + row, tl.where(l > 0, m + tl.log2(l), -float("inf")), mask=n_ok)
    inverse = 1.0 / tl.where(l > 0, l, 1.0)
    for f in tl.static_range(V_FIELDS):
        c = f * V_W + v_w
        tl.store(
            o_ptr + row[:, None] * DV + c[None, :],
            acc[f] * inverse[:, None],
            mask=n_ok[:, None] & ((v_w < V_W) & (c < DV))[None, :],
        )


def launch(call: Call, pair: Pair, partials: Tensor, n_splits: int, n_exact: int) -> None:
    """Write the partial outputs of the heads of ``pair``: ``partials`` holds o and behind it lse, see the kernel."""
    query, rows = call.query, call.rows
    dk, dv = call.keys.head_dim, call.values.head_dim
    heads = call.kv_heads if pair.heads is None else pair.heads.shape[1]
    launcher = _launcher(
        rows,
        query.shape[2],
        (dk, dv),
        (pair.keys.group_size, pair.values.group_size),
        (pair.keys.nbits, pair.values.nbits),
        (call.keys.axis, call.values.axis),
        call.mask_kind,
        call.softcap > 0,
        call.lengths is not None,
        pair.heads is not None,
        call.rotated,
        query.dtype,
        query.device,
    )
    o, lse = partials.split([partials.numel() // (dv + 1) * dv, partials.numel() // (dv + 1)])
    buffers = call.buffers(pair)
    pointers = (
        query,
        call.query_rotated if pair.keys.nbits < 16 else query,
        *buffers,
        query if call.mask is None else call.mask,
        query if call.lengths is None else call.lengths,
        query if pair.heads is None else pair.heads,
        o,
        lse,
    )
    numbers = (
        call.n_sink,
        call.n_key,
        call.n_value,
        call.n_total,
        n_exact,
        call.scale,
        call.softcap,
        heads,
        call.kv_heads,
        *call.strides(pair),
        *call.mask_strides,
    )
    # a program: a share of the tokens of one key head, up to 64 rows of queries
    grid = n_splits, query.shape[0] * heads, triton.cdiv(rows, launcher.constants["BLOCK_N"])
    if query.data_ptr() % 16 == 0 and all(buffer.aligned for buffer in buffers):
        kind = query.device.index, query.dtype, None if call.mask is None else call.mask.dtype
        launcher(grid, pointers, numbers, kind)
    else:  # a launcher's kernel takes the alignment for granted
        tensors = (x.read() if isinstance(x, TokenBuffer) else x for x in pointers)
        decode_kernel[grid](*tensors, *numbers, **launcher.constants, **launcher.options)


@functools.lru_cache
def _launcher(
    rows: int,
    query_length: int,
    head_dims: tuple[int, int],
    group_sizes: tuple[int, int],
    nbits: tuple[int, int],
    axes: tuple[str, str],
    mask_kind: int,
    softcap: bool,
    lengths_on_device: bool,
    mixed: bool,
    rotated: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Launcher:
    words = [-(-width * bits // 16) for width, bits in zip(head_dims, nbits, strict=True)]
    constants = {
        "ROWS": rows,
        "Q": query_length,
        "DK": head_dims[0],
        "DV": head_dims[1],
        "G_K": group_sizes[0],
        "G_V": group_sizes[1],
        "K_NBITS": nbits[0],
        "V_NBITS": nbits[1],
        "K_CHANNEL": axes[0] == "channel",
        "V_CHANNEL": axes[1] == "channel",
        "MASK": mask_kind,
        "SOFTCAP": softcap,
        "LENGTHS_ON_DEVICE": lengths_on_device,
        "MIXED": mixed,
        "ROTATED": rotated,
        "BLOCK_N": max(16, triton.next_power_of_2(min(rows, 64))),
        "BLOCK_T": portable_block(group_sizes, axes),
        "BLOCK_DK": max(16, triton.next_power_of_2(head_dims[0])),
        "BLOCK_KW": max(16, triton.next_power_of_2(words[0])),
        "BLOCK_VW": max(16, triton.next_power_of_2(words[1])),
        "DOT_TYPE": tl.float32 if dtype == torch.float32 else tl.float16,
        "PTX": device.type == "cuda" and torch.version.hip is None and dtype != torch.float32,
    }
    return Launcher(decode_kernel, constants, num_warps=portable_warps(device))
