"""Attention of a few query tokens over packed keys and values: split over the sequence, merged by combine.py.

Tokens lie in this order: the sinks, the packed ones, the newest ones. Keys and values may stop being packed at
different tokens. The kernel walks tiles of BLOCK_T tokens in which each tensor is of one kind, so there are four runs
of tiles: sinks; packed in both; packed in one (it starts at a tile's boundary, the tokens it shares with the run
before are masked); full precision in both. A program takes an even share of all tiles.

This kernel is portable and takes every format: it is the readable twin, and what the interpreter runs. On NVIDIA GPUs
decode_nvidia.py, many times faster, serves the common format, and other formats are dequantized first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kivicache.triton.combine import combine_splits
from kivicache.triton.tile import load_full, load_packed
from kivicache.triton.tuning import portable_splits, portable_warps

LOG2E = 1.4426950408889634


@triton.jit
def _half_range(x):
    """float16's range, for the dot; a NaN stays one."""
    return tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))


@triton.jit
def _scores_full(
    q_ptr,
    row,
    n_ok,
    ptr,
    t,
    t_stop,
    stride_t,
    c0,
    BLOCK_T: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    FIELDS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """Raw scores of full-precision keys: float32 [rows, BLOCK_T]."""
    s = tl.zeros([row.shape[0], BLOCK_T], tl.float32)
    for f in tl.static_range(FIELDS):
        c = f * W + c0
        q = tl.load(
            q_ptr + row[:, None] * D + c[None, :], mask=n_ok[:, None] & ((c0 < W) & (c < D))[None, :], other=0.0
        )
        k = _half_range(load_full(ptr, t, t_stop, stride_t, c0, f, W, D))
        s = tl.dot(q.to(DOT_TYPE), tl.trans(k.to(DOT_TYPE)), s, input_precision="ieee")
    return s


@triton.jit
def _scores_packed(
    q_ptr,
    row,
    n_ok,
    word_ptr,
    scale_ptr,
    min_ptr,
    t,
    t_stop,
    stride_t,
    c0,
    BLOCK_T: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    NBITS: tl.constexpr,
    G: tl.constexpr,
    AXIS_CHANNEL: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """Raw scores of packed keys: float32 [rows, BLOCK_T]."""
    s = tl.zeros([row.shape[0], BLOCK_T], tl.float32)
    for f in tl.static_range(16 // NBITS):
        c = f * W + c0
        q = tl.load(
            q_ptr + row[:, None] * D + c[None, :], mask=n_ok[:, None] & ((c0 < W) & (c < D))[None, :], other=0.0
        )
        k = _half_range(
            load_packed(
                word_ptr,
                scale_ptr,
                min_ptr,
                t,
                t_stop,
                stride_t,
                c0,
                f,
                NBITS,
                W,
                D,
                G,
                AXIS_CHANNEL,
                G % BLOCK_T == 0,
            )
        )
        s = tl.dot(q.to(DOT_TYPE), tl.trans(k.to(DOT_TYPE)), s, input_precision="ieee")
    return s


@triton.jit
def _add_full(acc, p, ptr, t, t_stop, stride_t, c0, D: tl.constexpr, W: tl.constexpr, FIELDS: tl.constexpr):
    """acc + p . full-precision values, field by field."""
    new = ()
    for f in tl.static_range(FIELDS):
        v = _half_range(load_full(ptr, t, t_stop, stride_t, c0, f, W, D))
        new = new + (tl.dot(p, v.to(p.dtype), acc[f], input_precision="ieee"),)
    return new


@triton.jit
def _add_packed(
    acc,
    p,
    word_ptr,
    scale_ptr,
    min_ptr,
    t,
    t_stop,
    stride_t,
    c0,
    D: tl.constexpr,
    W: tl.constexpr,
    NBITS: tl.constexpr,
    G: tl.constexpr,
    AXIS_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """acc + p . packed values, field by field."""
    new = ()
    for f in tl.static_range(16 // NBITS):
        v = _half_range(
            load_packed(
                word_ptr, scale_ptr, min_ptr, t, t_stop, stride_t, c0, f, NBITS, W, D, G, AXIS_CHANNEL, ALIGNED
            )
        )
        new = new + (tl.dot(p, v.to(p.dtype), acc[f], input_precision="ieee"),)
    return new


@triton.jit
def decode_kernel(
    q_ptr,  # [B, H, ROWS, D]: the query heads of a key head, each with its Q query tokens, are its rows
    k_word_ptr,
    v_word_ptr,  # int16 [B, H, T, W]
    k_scale_ptr,
    k_min_ptr,
    v_scale_ptr,
    v_min_ptr,  # float16 [B, H, T / G, D] or [B, H, T, ceil(D / G)]
    k_sink_ptr,
    v_sink_ptr,
    k_new_ptr,
    v_new_ptr,  # [B, H, tokens, D]
    mask_ptr,  # bool as uint8, or additive: [B, 1 or query heads, Q, positions]
    len_ptr,  # int32 [4]: n_sink, n_key, n_value, n_total, when LENGTHS_ON_DEVICE
    o_ptr,
    lse_ptr,  # float32 [B * H, splits, ROWS, D], [B * H, splits, ROWS]
    n_sink,
    n_key,
    n_value,
    n_total,
    scale,
    cap,
    H,
    stride_kwb,
    stride_kwh,
    stride_kwt,
    stride_vwb,
    stride_vwh,
    stride_vwt,
    stride_kmb,
    stride_kmh,
    stride_vmb,
    stride_vmh,
    stride_ksb,
    stride_ksh,
    stride_kst,
    stride_vsb,
    stride_vsh,
    stride_vst,
    stride_knb,
    stride_knh,
    stride_knt,
    stride_vnb,
    stride_vnh,
    stride_vnt,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mt,
    ROWS: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    K_NBITS: tl.constexpr,
    V_NBITS: tl.constexpr,
    K_W: tl.constexpr,
    V_W: tl.constexpr,
    K_CHANNEL: tl.constexpr,
    V_CHANNEL: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LENGTHS_ON_DEVICE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_KW: tl.constexpr,
    BLOCK_VW: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    LOG2E_: tl.constexpr = 1.4426950408889634
    K_FIELDS: tl.constexpr = 16 // K_NBITS
    V_FIELDS: tl.constexpr = 16 // V_NBITS
    i_s = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    n_s = tl.num_programs(0)
    i_b, i_h = i_bh // H, i_bh % H
    if LENGTHS_ON_DEVICE:
        n_sink = tl.load(len_ptr)
        n_key = tl.load(len_ptr + 1)
        n_value = tl.load(len_ptr + 2)
        n_total = tl.load(len_ptr + 3)
    k_word_ptr += i_b * stride_kwb + i_h * stride_kwh
    v_word_ptr += i_b * stride_vwb + i_h * stride_vwh
    k_scale_ptr += i_b * stride_kmb + i_h * stride_kmh
    k_min_ptr += i_b * stride_kmb + i_h * stride_kmh
    v_scale_ptr += i_b * stride_vmb + i_h * stride_vmh
    v_min_ptr += i_b * stride_vmb + i_h * stride_vmh
    k_sink_ptr += i_b * stride_ksb + i_h * stride_ksh
    v_sink_ptr += i_b * stride_vsb + i_h * stride_vsh
    k_new_ptr += i_b * stride_knb + i_h * stride_knh
    v_new_ptr += i_b * stride_vnb + i_h * stride_vnh

    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < ROWS
    q_row = i_bh * ROWS + n
    k_w = tl.arange(0, BLOCK_KW)
    v_w = tl.arange(0, BLOCK_VW)
    mask_row = i_b * stride_mb + (i_h * (ROWS // Q) + n // Q) * stride_mh + (n % Q) * stride_mq

    n_both = tl.minimum(n_key, n_value)
    n_one = tl.maximum(n_key, n_value)
    tiles_sink = (n_sink + BLOCK_T - 1) // BLOCK_T
    tiles_both = tiles_sink + (n_both + BLOCK_T - 1) // BLOCK_T
    one_first = n_both // BLOCK_T * BLOCK_T
    tiles_one = tiles_both + tl.where(n_one > n_both, (n_one - one_first + BLOCK_T - 1) // BLOCK_T, 0)
    tiles = tiles_one + (n_total - n_sink - n_one + BLOCK_T - 1) // BLOCK_T
    share = (tiles + n_s - 1) // n_s

    m = tl.full([BLOCK_N], -1e30, tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)
    acc = ()
    for _ in tl.static_range(V_FIELDS):
        acc = acc + (tl.zeros([BLOCK_N, BLOCK_VW], tl.float32),)

    for i in range(tl.minimum(i_s * share, tiles), tl.minimum(i_s * share + share, tiles)):
        start = 0
        if i < tiles_sink:
            first = i * BLOCK_T
            stop = n_sink
        else:
            if i < tiles_both:
                first = n_sink + (i - tiles_sink) * BLOCK_T
                stop = n_sink + n_both
            else:
                if i < tiles_one:
                    first = n_sink + one_first + (i - tiles_both) * BLOCK_T
                    stop = n_sink + n_one
                    start = n_sink + n_both
                else:
                    first = n_sink + n_one + (i - tiles_one) * BLOCK_T
                    stop = n_total
        # one branch a tensor and tile, so that the loads of all its fields are under way together
        t = first + tl.arange(0, BLOCK_T)
        t64 = t.to(tl.int64)
        if first < n_sink:
            s = _scores_full(
                q_ptr, q_row, n_ok, k_sink_ptr, t64, stop, stride_kst, k_w, BLOCK_T, D, K_W, K_FIELDS, DOT_TYPE
            )
        else:
            if K_NBITS < 16 and stop <= n_sink + n_key:
                s = _scores_packed(
                    q_ptr,
                    q_row,
                    n_ok,
                    k_word_ptr,
                    k_scale_ptr,
                    k_min_ptr,
                    t64 - n_sink,
                    stop - n_sink,
                    stride_kwt,
                    k_w,
                    BLOCK_T,
                    D,
                    K_W,
                    K_NBITS,
                    G,
                    K_CHANNEL,
                    DOT_TYPE,
                )
            else:
                s = _scores_full(
                    q_ptr,
                    q_row,
                    n_ok,
                    k_new_ptr,
                    t64 - n_sink - n_key,
                    stop - n_sink - n_key,
                    stride_knt,
                    k_w,
                    BLOCK_T,
                    D,
                    K_W,
                    K_FIELDS,
                    DOT_TYPE,
                )
        s *= scale
        if SOFTCAP:
            s = cap * LOG2E_ * (1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 / cap))))
        if MASK != 0:
            x = tl.load(
                mask_ptr + mask_row[:, None] + t.to(tl.int64)[None, :] * stride_mt,
                mask=n_ok[:, None] & (t < stop)[None, :],
                other=0,
            )
            if MASK == 1:
                s = tl.where(x != 0, s, -float("inf"))
            else:
                s += x.to(tl.float32) * LOG2E_
        s = tl.where(((t >= start) & (t < stop))[None, :], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        l = l * alpha + tl.sum(p, 1)
        m = m_new
        scaled = ()
        for f in tl.static_range(V_FIELDS):
            scaled = scaled + (acc[f] * alpha[:, None],)
        p = p.to(DOT_TYPE)
        if first < n_sink:
            acc = _add_full(scaled, p, v_sink_ptr, t64, stop, stride_vst, v_w, D, V_W, V_FIELDS)
        else:
            if V_NBITS < 16 and stop <= n_sink + n_value:
                acc = _add_packed(
                    scaled,
                    p,
                    v_word_ptr,
                    v_scale_ptr,
                    v_min_ptr,
                    t64 - n_sink,
                    stop - n_sink,
                    stride_vwt,
                    v_w,
                    D,
                    V_W,
                    V_NBITS,
                    G,
                    V_CHANNEL,
                    G % BLOCK_T == 0,
                )
            else:
                acc = _add_full(
                    scaled,
                    p,
                    v_new_ptr,
                    t64 - n_sink - n_value,
                    stop - n_sink - n_value,
                    stride_vnt,
                    v_w,
                    D,
                    V_W,
                    V_FIELDS,
                )

    row = (i_bh * n_s + i_s) * ROWS + n
    tl.store(lse_ptr + row, tl.where(l > 0, m + tl.log2(l), -float("inf")), mask=n_ok)
    inverse = 1.0 / tl.where(l > 0, l, 1.0)
    for f in tl.static_range(V_FIELDS):
        c = f * V_W + v_w
        tl.store(
            o_ptr + row[:, None] * D + c[None, :],
            acc[f] * inverse[:, None],
            mask=n_ok[:, None] & ((v_w < V_W) & (c < D))[None, :],
        )


def format_reasons(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    nbits: tuple[int, ...],
    group_size: int,
    axes: tuple[str, ...],
) -> list[str]:
    """Why decode_nvidia.py cannot serve tensors of this kind: empty if it can."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return ["needs an NVIDIA GPU of compute capability 8.0 or later"]
    reasons = []
    if dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {dtype} is neither float16 nor bfloat16")
    if head_dim not in (64, 128, 256):
        reasons.append(f"head_dim {head_dim} is none of 64, 128, 256")
    if group_size != 32 or tuple(axes) != ("channel", "token"):
        reasons.append(f"group_size {group_size} and axes {axes} are not 32, (channel, token)")
    for n in nbits:
        if n not in (2, 4, 8) or head_dim * n // 16 < 16:
            reasons.append(f"{n} bits at head_dim {head_dim} are fewer than 16 words of packed codes")
    return reasons


def fast_reasons(
    query: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    sinks: tuple[Tensor, ...],
    newest: tuple[Tensor, ...],
    nbits: tuple[int, ...],
    group_size: int,
    axes: tuple[str, ...],
    scale: float,
) -> list[str]:
    """Why decode_nvidia.py cannot serve these very tensors: empty if it can."""
    reasons = format_reasons(query.device, query.dtype, query.shape[-1], nbits, group_size, axes)
    if scale <= 0:
        reasons.append(f"scale {scale} is not positive")
    for x in (*keys, *values, *sinks, *newest):
        # cp.async copies 16 aligned bytes
        if x.numel() and (x.data_ptr() % 16 or any(s % 16 for s in x.stride()[:2]) or x.stride(-1) != 1):
            reasons.append(
                f"a tensor of shape {tuple(x.shape)} and strides {x.stride()} is not aligned to 16 elements"
            )
    return reasons


def decode_attention(
    query: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    sinks: tuple[Tensor, ...],
    newest: tuple[Tensor, ...],
    *,
    nbits: tuple[int, ...],
    group_size: int,
    axes: tuple[str, ...] = ("channel", "token"),
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    lengths: Tensor | None = None,
    fast: bool | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention over packed and full-precision tokens in one launch, and a merge.

    Args:
        query: ``[B, query heads, Q, D]``.
        keys: (words int16 ``[B, H, T, W]``, scale, minimum float16).
        values: the same; their T may differ.
        sinks: (keys, values) in full precision, ``[B, H, tokens, D]``, of the query's dtype.
        newest: the same; they follow the packed tokens.
        nbits: (key, value), each 2, 4, 8, or 16 for a tensor with no packed tokens.
        group_size, axes: as in ``quantization.quantize``; axes is (key, value).
        mask: None, bool (True: attend) or additive; ``[B, 1 or query heads, Q, positions]``. More than one query token
            needs it for causality.
        scale: of the scores, default ``D ** -0.5``.
        softcap: 0 is off.
        lengths: int32 ``[4]`` on the device: how many sinks, packed keys, packed values and tokens in all are valid.
            The tensors are then capacities, and a captured graph goes on working as the lengths grow.
        fast: decode_nvidia.py (True) or this file's kernel (False); default: the former on an NVIDIA GPU.
        splits: programs per key head, default from tuning.py.

    Returns:
        ``[B, query heads, Q, D]``, the query's dtype. A row whose mask is all closed is 0.

    Raises:
        ValueError: where the fast kernel is asked for and cannot serve, with the reasons.
    """
    B, heads, Q, D = query.shape
    H = keys[0].shape[1]
    rows = heads // H * Q
    query = query.contiguous()
    n_sink, n_key, n_value = sinks[0].shape[2], keys[0].shape[2], values[0].shape[2]
    n_total = n_sink + n_key + newest[0].shape[2]
    if lengths is None and n_total != n_sink + n_value + newest[1].shape[2]:
        raise ValueError(f"keys hold {n_total} tokens, values {n_sink + n_value + newest[1].shape[2]}")
    scale = D**-0.5 if scale is None else scale
    reasons = fast_reasons(query, keys, values, sinks, newest, nbits, group_size, axes, scale)
    if fast is None:
        fast = query.device.type == "cuda" and torch.version.hip is None
    if fast and reasons:
        raise ValueError("decode_nvidia cannot serve this: " + "; ".join(reasons))
    mask_kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    if mask_kind == 1:
        mask = mask.view(torch.uint8)
    mask_strides = (
        (0, 0, 0, 0) if mask is None else tuple(0 if mask.shape[d] == 1 else mask.stride(d) for d in range(4))
    )
    tensors = (
        query,
        keys[0],
        values[0],
        *keys[1:],
        *values[1:],
        *sinks,
        *newest,
        query if mask is None else mask,
        query if lengths is None else lengths,
    )
    strides = (
        *sinks[0].stride()[:3],
        *sinks[1].stride()[:3],
        *newest[0].stride()[:3],
        *newest[1].stride()[:3],
        *mask_strides,
    )
    sizes = (n_sink, n_key, n_value, n_total, scale * LOG2E, softcap)
    flags = {"MASK": mask_kind, "SOFTCAP": softcap > 0, "LENGTHS_ON_DEVICE": lengths is not None}
    if fast:
        from kivicache.triton import decode_nvidia  # Gluon is for NVIDIA alone

        o, lse = decode_nvidia.launch(tensors, sizes, strides, flags, B, H, rows, Q, D, group_size, nbits, splits)
    else:
        block_n = max(16, triton.next_power_of_2(min(rows, 64)))
        words = [D if n == 16 else -(-D * n // 16) for n in nbits]
        n_splits = splits or portable_splits(n_total, B * H * triton.cdiv(rows, block_n), query.device)
        o = torch.empty(B * H, n_splits, rows, D, dtype=torch.float32, device=query.device)
        lse = torch.empty(B * H, n_splits, rows, dtype=torch.float32, device=query.device)
        # a program: a share of the tokens of one key head, up to 64 rows of queries
        decode_kernel[(n_splits, B * H, triton.cdiv(rows, block_n))](
            *tensors,
            o,
            lse,
            *sizes,
            H,
            *keys[0].stride()[:3],
            *values[0].stride()[:3],
            *keys[1].stride()[:2],
            *values[1].stride()[:2],
            *strides,
            ROWS=rows,
            Q=Q,
            D=D,
            G=group_size,
            K_NBITS=nbits[0],
            V_NBITS=nbits[1],
            K_W=words[0],
            V_W=words[1],
            K_CHANNEL=axes[0] == "channel",
            V_CHANNEL=axes[1] == "channel",
            **flags,
            BLOCK_N=block_n,
            BLOCK_T=32,
            BLOCK_KW=max(16, triton.next_power_of_2(words[0])),
            BLOCK_VW=max(16, triton.next_power_of_2(words[1])),
            DOT_TYPE=tl.float32 if query.dtype == torch.float32 else tl.float16,
            num_warps=portable_warps(query.device),
        )
    return combine_splits(o, lse, query)
