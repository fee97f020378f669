"""The fast twin of decode_portable.py for NVIDIA: 2, 4 and 8 bits, keys per channel, values per token.

One warp a program: no barrier ever waits for another warp. The packed bytes of the next tile travel to shared memory
(cp.async) while this one is worked on, so nothing in flight holds a register.
"""

from __future__ import annotations

import functools

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kivicache.triton import tuning
from kivicache.triton.launch import Launcher
from kivicache.triton.operands import Call, Pair
from kivicache.triton.tile_nvidia import (
    async_copy,
    code_factor,
    exp2,
    finish_scores,
    gl_barrier,
    groups_of,
    half_operand_layout,
    issue_tile,
    load_full_tile,
    load_value_words,
    mma_v2,
    mul_half,
    operand_words,
    query_factor,
    row_blocks,
    row_layout,
    row_powers,
    scale_layout,
    score_unit,
    shared_layout,
    split_columns,
    stack_rows,
    store_rows,
    tile_scores,
    to_half,
    unpack_field,
)


@gluon.jit(
    do_not_specialize=["n_sink", "n_key", "n_value", "n_total", "n_exact", "mask_b", "mask_h", "mask_q", "mask_t"],
    do_not_specialize_on_alignment=["mask_ptr", "len_ptr", "head_ptr", "lse_ptr"],
)
def decode_kernel(
    q_ptr,  # float16 or bfloat16 [B, HEADS, ROWS, D]: a key head's query heads, each with its Q tokens, are its rows
    qr_ptr,  # the same for packed keys: rotated where they are
    kw,
    vw,  # words int16 [B, heads, T, WK], [B, heads, T, WV]
    ks,
    km,  # keys' scale, minimum float16 [B, heads, T / G, D]
    vs,
    vm,  # values' scale, minimum float16 [B, heads, T, D / G]
    kst,
    vst,
    kr,
    vr,  # sinks and newest tokens in full precision, [B, HEADS, tokens, D], of q's dtype
    mask_ptr,  # bool as uint8, or additive: [B, 1 or query heads, Q, positions]
    len_ptr,  # int32: n_sink, n_key, n_value, n_total, .., when DEVLEN
    head_ptr,  # int32 [3, H], when MIXED: the key head, and where it lies in the stores of keys and of values
    o_ptr,
    lse_ptr,  # float32 [B * HEADS, splits, ROWS, D], [B * HEADS, splits, ROWS]
    n_sink,
    n_key,
    n_value,
    n_total,
    n_exact,  # when ROTATED: the first splits, for the values that are not rotated
    scale,
    cap,
    kw_b,
    kw_h,
    vw_b,
    vw_h,
    km_b,
    km_h,
    vm_b,
    vm_h,
    kst_b,
    kst_h,
    vst_b,
    vst_h,
    kr_b,
    kr_h,
    vr_b,
    vr_h,
    mask_b,
    mask_h,
    mask_q,
    mask_t,
    H: gl.constexpr,
    HEADS: gl.constexpr,
    ROWS: gl.constexpr,
    Q: gl.constexpr,
    N: gl.constexpr,
    D: gl.constexpr,
    G: gl.constexpr,
    BK: gl.constexpr,
    BV: gl.constexpr,
    WK: gl.constexpr,
    WV: gl.constexpr,
    BT: gl.constexpr,
    STAGES: gl.constexpr,
    MASK: gl.constexpr,
    SOFTCAP: gl.constexpr,
    DEVLEN: gl.constexpr,
    MIXED: gl.constexpr,
    ROTATED: gl.constexpr,
):
    i_s = gl.program_id(0)
    row = gl.program_id(2) * N
    n_s = gl.num_programs(0)
    i_b = (gl.program_id(1) // H).to(gl.int64)
    i_h = (gl.program_id(1) % H).to(gl.int64)
    h_k = i_h
    h_v = i_h
    if MIXED:
        h_k = gl.load(head_ptr + H + i_h).to(gl.int64)
        h_v = gl.load(head_ptr + 2 * H + i_h).to(gl.int64)
        i_h = gl.load(head_ptr + i_h).to(gl.int64)
    i_bh = i_b * HEADS + i_h
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    ROW: gl.constexpr = gl.SliceLayout(0, MMA)
    UK: gl.constexpr = operand_words(WK)
    UV: gl.constexpr = operand_words(WV)
    NC: gl.constexpr = D // G
    NCP: gl.constexpr = 8 if NC < 8 else 16
    NG: gl.constexpr = groups_of(BT, G)
    WB: gl.constexpr = UV if UV < G else G
    NN: gl.constexpr = ROWS // Q  # query heads of one key head
    # p is 32 at the most, not 1: the weights far below the largest, thousands of which add up, keep 5 more bits above
    # float16's smallest, and a value's scale may still be 2047.
    P_SHIFT: gl.constexpr = 5
    P_FACTOR: gl.constexpr = 32.0
    # Where nothing needs the scores themselves, the factor waits for the exponential and costs nothing there.
    DEFER: gl.constexpr = MASK != 2 and not SOFTCAP
    if DEVLEN:
        n_sink = gl.load(len_ptr)
        n_key = gl.load(len_ptr + 1)
        n_value = gl.load(len_ptr + 2)
        n_total = gl.load(len_ptr + 3)
    T = gl.minimum(n_key, n_value)
    kw += i_b * kw_b + h_k * kw_h
    vw += i_b * vw_b + h_v * vw_h
    ks += i_b * km_b + h_k * km_h
    km += i_b * km_b + h_k * km_h
    vs += i_b * vm_b + h_v * vm_h
    vm += i_b * vm_b + h_v * vm_h
    # the mask's head stride serves [B, 1, q, T] (0) and [B, heads, q, T] through the row's own head
    mask_ptr += i_b * mask_b
    row0 = (i_bh * n_s + i_s) * ROWS + row
    n_ok = ROWS - row
    nn = gl.arange(0, N, layout=ROW)

    # Full-precision tokens, 32 at a time: the sinks, the newest, and those that only one of keys and values has packed
    # (keys and values may be split at different tokens). In a tile each is of one kind.
    DT: gl.constexpr = q_ptr.dtype.element_ty
    SX: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    sx = gl.allocate_shared_memory(DT, [32, D], SX)
    n_e = gl.arange(0, N, layout=gl.SliceLayout(0, B))
    oe = (i_bh * ROWS + row + n_e)[None, :] * D + gl.arange(0, D, layout=gl.SliceLayout(1, B))[:, None]
    qe = gl.load(q_ptr + oe, mask=(n_e < n_ok)[None, :], other=0.0)
    kst += i_b * kst_b + i_h * kst_h
    vst += i_b * vst_b + i_h * vst_h
    kr += i_b * kr_b + i_h * kr_h
    vr += i_b * vr_b + i_h * vr_h
    n_one = gl.maximum(n_key, n_value)
    tiles_sink = (n_sink + 31) // 32
    tiles_new = tiles_sink + (n_total - n_sink - n_one + 31) // 32
    tiles = tiles_new + (n_one - T + 31) // 32
    m_e = gl.full([N], -1e30, gl.float32, layout=ROW)
    l_e = gl.zeros([N], gl.float32, layout=ROW)
    acc_e = gl.zeros([D, N], gl.float32, layout=MMA)
    # The work in units of one tile of BT packed tokens, a full-precision tile counting as two: an even share for each
    # program, the full-precision tiles to the first programs.
    packed_tiles = (T + BT - 1) // BT
    units = 2 * tiles
    first_unit = 0
    last_unit = 0
    if ROTATED:  # a split holds rotated values or others, never both: the merge turns back the sum of the former
        exact = 2 * gl.where(n_value > n_key, tiles_new, tiles)
        if i_s < n_exact:
            # whole tiles each, so that no two programs meet in one
            share = 2 * ((exact // 2 + n_exact - 1) // n_exact)
            first_unit = gl.minimum(i_s * share, exact)
            last_unit = gl.minimum(i_s * share + share, exact)
        else:
            share = (units - exact + packed_tiles + n_s - n_exact - 1) // (n_s - n_exact)
            first_unit = exact + (i_s - n_exact) * share
            last_unit = first_unit + share
    else:
        share = (units + packed_tiles + n_s - 1) // n_s
        first_unit = i_s * share
        last_unit = first_unit + share
    edge_first = gl.minimum((first_unit + 1) // 2, tiles)
    edge_last = gl.minimum((last_unit + 1) // 2, tiles)
    t_first = gl.minimum(gl.maximum(first_unit - units, 0), packed_tiles) * BT
    t_last = gl.minimum(gl.maximum(last_unit - units, 0) * BT, T)
    n_tiles = gl.maximum(t_last - t_first + BT - 1, 0) // BT

    for i in range(edge_first, edge_last):
        gl_barrier()
        # first, stop: positions of this tile
        if i < tiles_sink:
            first = i * 32
            stop = n_sink
        else:
            if i < tiles_new:
                first = n_sink + n_one + (i - tiles_sink) * 32
                stop = n_total
            else:
                first = n_sink + T + (i - tiles_new) * 32
                stop = n_sink + n_one
        load_full_tile(sx, kst, kr, kw, ks, km, first, stop, n_sink, n_key, BK, WK, True, D, G)
        qx = qe
        if ROTATED:
            if (first >= n_sink) & (stop <= n_sink + n_key):  # packed keys
                qx = gl.load(qr_ptr + oe, mask=(n_e < n_ok)[None, :], other=0.0)
        s = mma_v2(sx.load(A), qx, gl.zeros([32, N], gl.float32, layout=MMA)) * scale
        gl_barrier()
        load_full_tile(sx, vst, vr, vw, vs, vm, first, stop, n_sink, n_value, BV, WV, False, D, G)
        t = first + gl.arange(0, 32, layout=gl.SliceLayout(1, MMA))
        s = finish_scores(
            s, t, stop, 0, mask_ptr + i_h * NN * mask_h, row, mask_h, mask_q, mask_t, cap, MASK, SOFTCAP, ROWS, Q, MMA
        )
        s = gl.where((t < stop)[:, None], s, -float("inf"))
        m_new = gl.maximum(m_e, gl.max(s, 0))
        alpha = exp2(m_e - m_new)
        m_e = m_new
        p = exp2(s - m_new[None, :])
        l_e = l_e * alpha + gl.sum(p, 0)
        acc_e = mma_v2(sx.permute([1, 0]).load(A), gl.convert_layout(p.to(DT), B), acc_e * alpha[None, :])
    # The query, per field. Each row times a power of two that brings it below 1, so that its product with a key scale
    # stays within float16; the scores are multiplied back, and with the scale, in float32.
    n = gl.arange(0, N, layout=gl.SliceLayout(0, B))
    w = gl.arange(0, UK, layout=gl.SliceLayout(1, B))
    qp = qr_ptr + (i_bh * ROWS + row + n[None, :]) * D + w[:, None]
    q = ()
    for f in gl.static_range(D // UK):
        q = q + (gl.load(qp + f * UK, mask=(n < n_ok)[None, :], other=0.0).to(gl.float32),)
    shrink, grow = row_powers(q, D // UK)
    qb = ()
    for f in gl.static_range(D // UK):
        qb = qb + (to_half(q[f] * (shrink * query_factor(BK, f * UK // WK))[None, :]),)
    score_factor = gl.convert_layout(grow, ROW) * (scale * score_unit(BK))
    gl_barrier()
    # shared memory rings
    S1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SP: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    skw = gl.allocate_shared_memory(gl.int16, [STAGES, BT, WK], shared_layout(WK, 2))
    svw = gl.allocate_shared_memory(gl.int16, [STAGES, BT, WV], shared_layout(WV, 2))
    sks = gl.allocate_shared_memory(gl.float16, [STAGES, NG * D], S1)
    skm = gl.allocate_shared_memory(gl.float16, [STAGES, NG * D], S1)
    svs = gl.allocate_shared_memory(gl.float16, [STAGES, BT, NC], SP)
    # the values' minimum sits in a tile of NCP columns: NC of them, then a column of ones (the sum of p), then zeros
    svm = gl.allocate_shared_memory(gl.float16, [STAGES, BT, NCP], SP)
    LI: gl.constexpr = gl.BlockedLayout([1, 8], [256 // NCP, NCP // 8], [1, 1], [1, 0])
    ci = gl.arange(0, NCP, layout=gl.SliceLayout(0, LI))
    ones = gl.where(ci == NC, 1.0, 0.0).to(gl.float16)
    init = gl.broadcast(gl.expand_dims(ones, 0), gl.zeros([BT, NCP], gl.float16, layout=LI))[0]
    for st in gl.static_range(STAGES):
        svm.index(st).store(init)
    gl_barrier()

    for st in gl.static_range(STAGES - 1):
        issue_tile(
            kw,
            vw,
            ks,
            km,
            vs,
            vm,
            skw.index(st),
            svw.index(st),
            sks.index(st),
            skm.index(st),
            svs.index(st),
            svm.index(st).slice(0, NC, dim=1),
            t_first + st * BT,
            t_last,
            BT,
            D,
            G,
            WK,
            WV,
        )

    # go on from the full-precision tokens' state
    m_i = m_e
    rows = gl.arange(0, 16, layout=gl.SliceLayout(1, MMA))
    acc_m = gl.where((rows == NC)[:, None], l_e[None, :] * P_FACTOR, gl.zeros([16, N], gl.float32, layout=MMA))
    blocks = row_blocks(acc_e, D // WB, MMA)
    acc = ()
    for c in gl.static_range(D // WB):
        acc = acc + (blocks[c] * (P_FACTOR / code_factor(BV, c * WB // WV)),)

    for i in range(n_tiles):
        async_copy.wait_group(STAGES - 2)
        gl_barrier()
        j = i + STAGES - 1
        nx = j % STAGES
        issue_tile(
            kw,
            vw,
            ks,
            km,
            vs,
            vm,
            skw.index(nx),
            svw.index(nx),
            sks.index(nx),
            skm.index(nx),
            svs.index(nx),
            svm.index(nx).slice(0, NC, dim=1),
            t_first + j * BT,
            t_last,
            BT,
            D,
            G,
            WK,
            WV,
        )
        cur = i % STAGES
        s = tile_scores(qb, skw.index(cur), sks.index(cur), skm.index(cur), MMA, N, D, G, WK, BK)
        t = t_first + i * BT + gl.arange(0, BT, layout=gl.SliceLayout(1, MMA))
        if not DEFER:
            s = s * score_factor[None, :]
        s = finish_scores(
            s,
            t,
            t_last,
            n_sink,
            mask_ptr + i_h * NN * mask_h,
            row,
            mask_h,
            mask_q,
            mask_t,
            cap,
            MASK,
            SOFTCAP,
            ROWS,
            Q,
            MMA,
        )
        if i == n_tiles - 1:
            s = gl.where((t < t_last)[:, None], s, -float("inf"))
        if DEFER:
            m_new = gl.maximum(m_i, gl.max(s, 0) * score_factor)
            p = exp2(
                gl.fma(s, gl.broadcast(score_factor[None, :], s)[0], gl.broadcast((P_SHIFT - m_new)[None, :], s)[0])
            )
        else:
            m_new = gl.maximum(m_i, gl.max(s, 0))
            p = exp2(s + (P_SHIFT - m_new)[None, :])
        alpha = exp2(m_i - m_new)
        m_i = m_new
        p = gl.convert_layout(to_half(p), B)
        # minimum and sum of p
        if NCP == 8:
            vmt = svm.index(cur).permute([1, 0]).load(half_operand_layout(BT))
            vmt = stack_rows(vmt, gl.zeros([8, BT], gl.float16, layout=half_operand_layout(BT)), A)
        else:
            vmt = svm.index(cur).permute([1, 0]).load(A)
        acc_m = mma_v2(vmt, p, acc_m * alpha[None, :])
        words = load_value_words(svw.index(cur), BV, A)
        svt = split_columns(svs.index(cur).load(scale_layout(BT, NC)), BT, NC)
        new = ()
        pg = p
        for f in gl.static_range(D // UV):
            codes = row_blocks(unpack_field(words, BV, f * UV // WV), UV // WB, A)
            for b in gl.static_range(UV // WB):
                if (f * UV + b * WB) % G == 0:
                    sg = gl.convert_layout(svt[(f * UV + b * WB) // G], gl.SliceLayout(1, B), assert_trivial=True)
                    pg = mul_half(p, gl.broadcast(gl.expand_dims(sg, 1), p)[0])
                new = new + (mma_v2(codes[b], pg, acc[f * (UV // WB) + b] * alpha[None, :]),)
        acc = new

    async_copy.wait_group(0)
    # minimum and sum of p sit in rows of acc_m
    gl_barrier()
    sm = gl.allocate_shared_memory(gl.float32, [16, N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]), acc_m)
    gl_barrier()
    LR: gl.constexpr = row_layout(MMA)
    l = gl.convert_layout(sm.slice(NC, 1, dim=0).load(LR).reshape([N]), ROW)
    gl.store(lse_ptr + row0 + nn, m_i - P_SHIFT + gl.log2(l), mask=nn < n_ok)
    inv = gl.where(l > 0, 1.0 / l, 0.0)
    for c in gl.static_range(D // WB):
        mn = gl.convert_layout(sm.slice(c * WB // G, 1, dim=0).load(LR).reshape([N]), ROW)
        store_rows(
            o_ptr, row0, (acc[c] * code_factor(BV, c * WB // WV) + mn[None, :]) * inv[None, :], n_ok, D, c * WB, MMA
        )


def launch(call: Call, pair: Pair, partials: Tensor, n_splits: int, n_exact: int) -> None:
    """Write the partial outputs of the heads of ``pair``: ``partials`` holds o and behind it lse, see the kernel."""
    query, rows, mask = call.query, call.rows, call.mask
    batch, _, query_length, head_dim = query.shape
    heads = call.kv_heads if pair.heads is None else pair.heads.shape[1]
    launcher = _launcher(
        heads,
        call.kv_heads,
        rows,
        query_length,
        head_dim,
        pair.keys.group_size,
        (pair.keys.nbits, pair.values.nbits),
        call.mask_kind,
        call.softcap > 0,
        call.lengths is not None,
        pair.heads is not None,
        call.rotated,
    )
    # a program: a share of the tokens of one key head, up to 16 rows of queries
    launcher(
        (n_splits, batch * heads, -(-rows // launcher.constants["N"])),
        (
            query,
            call.query_rotated,
            *call.buffers(pair),
            query if mask is None else mask,
            query if call.lengths is None else call.lengths,
            query if pair.heads is None else pair.heads,
            partials,
            partials[batch * call.kv_heads * n_splits * rows * head_dim :],
        ),
        (
            call.n_sink,
            call.n_key,
            call.n_value,
            call.n_total,
            n_exact,
            call.scale,
            call.softcap,
            *call.strides(pair),
            *call.mask_strides,
        ),
        (query.device.index, query.dtype, None if mask is None else mask.dtype),
    )


@functools.lru_cache
def _launcher(
    heads: int,
    kv_heads: int,
    rows: int,
    query_length: int,
    head_dim: int,
    group_size: int,
    nbits: tuple[int, int],
    mask_kind: int,
    softcap: bool,
    lengths_on_device: bool,
    mixed: bool,
    rotated: bool,
) -> Launcher:
    block = max(8, triton.next_power_of_2(min(rows, tuning.MAX_ROWS)))
    constants = {
        "H": heads,
        "HEADS": kv_heads,
        "ROWS": rows,
        "Q": query_length,
        "N": block,
        "D": head_dim,
        "G": group_size,
        "BK": nbits[0],
        "BV": nbits[1],
        "WK": head_dim * nbits[0] // 16,
        "WV": head_dim * nbits[1] // 16,
        "BT": tuning.BLOCK_T,
        "STAGES": tuning.STAGES,
        "MASK": mask_kind,
        "SOFTCAP": softcap,
        "DEVLEN": lengths_on_device,
        "MIXED": mixed,
        "ROTATED": rotated,
    }
    return Launcher(decode_kernel, constants, num_warps=1, maxnreg=tuning.max_registers(block, head_dim))
