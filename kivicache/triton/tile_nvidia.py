"""Device functions of decode_nvidia.py, in Gluon: Triton with explicit layouts, on NVIDIA's mma.sync (sm_80 on).

The trick that all of it serves: a code still at its place in a 16-bit word, ``w & mask``, is, read as a float16, the
denormal ``code * 2 ** (position - 24)``. The tensor cores multiply denormals exactly and at full speed, so unpacking
two codes is one AND (fields beyond bit 9 are shifted down first, one shift for all of them). The powers of two go into
the query, field by field, for the keys, and into the epilogue for the values. A scale is folded into the other operand
of the dot: q.(c s + mn) = (q s).c + q.mn, p.(c s + mn) = (p s).c + p.mn.

Tokens are the rows (keys) and channels the rows (values) of the dot's first operand, the query heads its 8 columns.

Such an operand is 16 words wide. A token of 8 words (2 bits at head_dim 64) is widened to 16: the words and, beside
them, the same words shifted by one field, so that one AND gives fields f and f + 1, which are neighbouring channels.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.runtime.jit import constexpr_function

# Triton 3.6 and 3.9 name these differently
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
gl_barrier_op = getattr(gl, "barrier", None) or gl.thread_barrier


if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def rows_of_two(x, D: gl.constexpr, L: gl.constexpr):
        """[32, D] in shared memory as [16, 2, D]."""
        return x.reinterpret(x.dtype, [16, 2, D], L)

else:

    @gluon.jit
    def rows_of_two(x, D: gl.constexpr, L: gl.constexpr):
        """[32, D] in shared memory as [16, 2, D]."""
        return x._reinterpret(x.dtype, [16, 2, D], L)


@gluon.jit
def gl_barrier():
    gl_barrier_op()


# Tokens of a key group of the finest kind: a tile is two such parts, and each lies in one group.
PART = gl.constexpr(32)


@constexpr_function
def operand_words(words):
    """The words of a token in a dot's operand, see above."""
    return max(words, 16)


@constexpr_function
def groups_of(tokens, group_size):
    """The key groups that ``tokens`` tokens from a multiple of them on lie in."""
    return max(tokens // group_size, 1)


@constexpr_function
def _pos(bits, f):
    return (f % (10 // bits)) * bits


@constexpr_function
def _e0(bits):
    return {2: 4, 4: 2, 8: 0}[bits]


@constexpr_function
def query_factor(bits, f):
    return 2.0 ** (_e0(bits) - _pos(bits, f))


@constexpr_function
def score_unit(bits):
    """What the dot of the query and the unpacked key codes must be multiplied with."""
    return 2.0 ** (24 - _e0(bits))


@constexpr_function
def code_factor(bits, f):
    """what an unpacked half must be multiplied with to be the code"""
    return 2.0 ** (24 - _pos(bits, f))


@constexpr_function
def _asm(bits, f):
    per = 10 // bits
    shift = (f // per) * per * bits
    mask = ((1 << bits) - 1) << _pos(bits, f)
    mask |= mask << 16
    if shift:
        return f"{{ .reg .b32 t; shr.u32 t, $1, {shift}; and.b32 $0, t, {mask}; }}"
    return f"and.b32 $0, $1, {mask};"


@constexpr_function
def shared_layout(cols, nbytes):
    rb = cols * nbytes
    per = max(1, 128 // rb)
    return gl.SwizzledSharedLayout(16 // nbytes, per, max(1, min(8 // per, rb // 16)), [1, 0])


@constexpr_function
def _copy_layout(cols, vec):
    t = min(32, cols // vec)
    return gl.BlockedLayout([1, vec], [32 // t, t], [1, 1], [1, 0])


@gluon.jit
def unpack_field(words, BITS: gl.constexpr, f: gl.constexpr):
    return gl.inline_asm_elementwise(_asm(BITS, f), "=r,r", [words], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _next_field(words, BITS: gl.constexpr):
    """Field f + 1 where field f was. The upper of two words leaves a field in the lower's last, which is not read."""
    return gl.inline_asm_elementwise(f"shr.b32 $0, $1, {BITS};", "=r,r", [words], dtype=gl.int16, is_pure=True, pack=2)


@gluon.jit
def mul_half(a, b):
    return gl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def to_half(x):
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def row_powers(q, FIELDS: gl.constexpr):
    """The power of two that brings a query row's largest magnitude into [0.5, 1), and its inverse: [N] each.

    q: the row's channels in FIELDS tensors [words, N], float32. A row below 2 ** -111, all zero for instance, is
    raised by no more than 2 ** 110: a field's own power on top of that is still a number, and 0 times infinity is not.
    """
    largest = gl.maximum(q[0], -q[0])
    for f in gl.static_range(1, FIELDS):
        largest = gl.maximum(largest, gl.maximum(q[f], -q[f]))
    exponent = gl.minimum(gl.maximum(gl.max(largest, 0).to(gl.int32, bitcast=True) >> 23, 16), 252)
    return ((253 - exponent) << 23).to(gl.float32, bitcast=True), ((exponent + 1) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def stack_rows(a, b, L: gl.constexpr):
    """[T, N], [T, N] -> [2T, N]"""
    T: gl.constexpr = a.shape[0]
    N: gl.constexpr = a.shape[1]
    x = gl.join(a, b).permute(2, 0, 1).reshape([2 * T, N])
    return gl.convert_layout(x, L, assert_trivial=True)


@gluon.jit
def issue_tile(
    kw,
    vw,
    ks,
    km,
    vs,
    vm,  # global bases of this head (pointers)
    skw,
    svw,
    sks,
    skm,
    svs,
    svm,  # shared, stage already chosen
    t0,
    T,
    BT: gl.constexpr,
    D: gl.constexpr,
    G: gl.constexpr,
    WK: gl.constexpr,
    WV: gl.constexpr,
):
    LK: gl.constexpr = _copy_layout(WK, 8)
    LV: gl.constexpr = _copy_layout(WV, 8)
    NC: gl.constexpr = D // G
    NG: gl.constexpr = groups_of(BT, G)
    LM: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    LS: gl.constexpr = gl.BlockedLayout([1, NC], [32, 1], [1, 1], [1, 0])
    r = t0 + gl.arange(0, BT, layout=gl.SliceLayout(1, LK))
    c = gl.arange(0, WK, layout=gl.SliceLayout(0, LK))
    async_load(skw, kw + r.to(gl.int64)[:, None] * WK + c[None, :], mask=(r < T)[:, None])
    e = gl.arange(0, NG * D, layout=LM)
    me = (t0 // G) * D + e < ((T + G - 1) // G) * D
    async_load(sks, ks + (t0 // G).to(gl.int64) * D + e, mask=me)
    async_load(skm, km + (t0 // G).to(gl.int64) * D + e, mask=me)
    r = t0 + gl.arange(0, BT, layout=gl.SliceLayout(1, LV))
    c = gl.arange(0, WV, layout=gl.SliceLayout(0, LV))
    async_load(svw, vw + r.to(gl.int64)[:, None] * WV + c[None, :], mask=(r < T)[:, None])
    r = t0 + gl.arange(0, BT, layout=gl.SliceLayout(1, LS))
    c = gl.arange(0, NC, layout=gl.SliceLayout(0, LS))
    o = r.to(gl.int64)[:, None] * NC + c[None, :]
    async_load(svs, vs + o, mask=(r < T)[:, None])
    async_load(svm, vm + o, mask=(r < T)[:, None])
    async_copy.commit_group()


@constexpr_function
def half_operand_layout(W):
    """[8, W]: one half of the rows of a dot's first operand."""
    regs = [[0, 1], [0, 8]] + [[0, 1 << i] for i in range(4, W.bit_length() - 1)]
    return gl.DistributedLinearLayout(regs, [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [], [], [8, W])


@constexpr_function
def _half_columns_layout(T):
    """[T, 8]: one half of the columns of a dot's first operand."""
    regs = [[0, 1], [8, 0]] + [[1 << i, 0] for i in range(4, T.bit_length() - 1)]
    return gl.DistributedLinearLayout(regs, [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [], [], [T, 8])


@gluon.jit
def load_key_words(x, BITS: gl.constexpr, A: gl.constexpr):
    """Words [T, W] in shared memory as a dot's first operand: [T, operand_words(W)]."""
    T: gl.constexpr = x.shape[0]
    if x.shape[1] == 8:
        half = x.load(_half_columns_layout(T))
        both = gl.join(half, _next_field(half, BITS)).permute(0, 2, 1).reshape([T, 16])
        return gl.convert_layout(both, A, assert_trivial=True)
    else:
        return x.load(A)


@gluon.jit
def load_value_words(x, BITS: gl.constexpr, A: gl.constexpr):
    """Words [T, W] in shared memory, channels as the rows of a dot's first operand: [operand_words(W), T]."""
    if x.shape[1] == 8:
        half = x.permute([1, 0]).load(half_operand_layout(x.shape[0]))
        return stack_rows(half, _next_field(half, BITS), A)
    else:
        return x.permute([1, 0]).load(A)


@gluon.jit
def _part_scores(
    acc,
    qb,
    skw,
    sks,
    MMA: gl.constexpr,
    part: gl.constexpr,
    D: gl.constexpr,
    G: gl.constexpr,
    WK: gl.constexpr,
    BK: gl.constexpr,
):
    """acc + q . (code * scale) / score_unit of PART tokens: [PART, N]."""
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    U: gl.constexpr = operand_words(WK)
    words = load_key_words(skw.slice(part * PART, PART, dim=0), BK, A)
    for i in gl.static_range(D // U):
        s = sks.slice(part * PART // G * D + i * U, U).load(gl.SliceLayout(1, B))
        s2 = gl.broadcast(gl.expand_dims(s, 1), qb[i])[0]
        acc = mma_v2(unpack_field(words, BK, i * U // WK), mul_half(qb[i], s2), acc)
    return acc


@gluon.jit
def _spread(x, MMA: gl.constexpr):
    """[8, N] of equal rows -> [PART, N]"""
    N: gl.constexpr = x.shape[1]
    y = gl.join(x, x)
    y = gl.join(y, y).permute(2, 3, 0, 1).reshape([PART, N])
    return gl.convert_layout(y, MMA, assert_trivial=True)


@gluon.jit
def tile_scores(
    qb,
    skw,
    sks,
    skm,
    MMA: gl.constexpr,
    N: gl.constexpr,
    D: gl.constexpr,
    G: gl.constexpr,
    WK: gl.constexpr,
    BK: gl.constexpr,
):
    """Scores of a tile, in units of score_unit: [2 * PART, N].

    The minimum's part comes first, from one chain of dots for both parts, each in a key group: rows 0 to 7 hold one
    part's minimum, rows 8 to 15 the other's. The codes' dots go on from there.
    """
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    gl.static_assert(skw.shape[0] == 2 * PART)
    U: gl.constexpr = operand_words(WK)
    R: gl.constexpr = half_operand_layout(U)
    PER: gl.constexpr = 10 // BK
    UNIT: gl.constexpr = score_unit(BK)
    off = gl.zeros([16, N], gl.float32, layout=MMA)
    for k in gl.static_range(PER):
        part = gl.zeros([16, N], gl.float32, layout=MMA)
        for i in gl.static_range(D // U):
            if (i * U // WK) % PER == k:
                z = gl.zeros([8, U], gl.float16, layout=R)
                m0 = skm.slice(i * U, U).load(gl.SliceLayout(0, R))
                m1 = skm.slice(PART // G * D + i * U, U).load(gl.SliceLayout(0, R))
                m0 = gl.broadcast(gl.expand_dims(m0, 0), z)[0]
                m1 = gl.broadcast(gl.expand_dims(m1, 0), z)[0]
                part = mma_v2(stack_rows(m0, m1, A), qb[i], part)
        if k == 0:
            off = part * (1.0 / (query_factor(BK, k) * UNIT))
        else:
            off += part * (1.0 / (query_factor(BK, k) * UNIT))
    o0, o1 = gl.split(off.reshape([2, 8, N]).permute(1, 2, 0))
    s0 = _part_scores(_spread(o0, MMA), qb, skw, sks, MMA, 0, D, G, WK, BK)
    s1 = _part_scores(_spread(o1, MMA), qb, skw, sks, MMA, 1, D, G, WK, BK)
    return stack_rows(s0, s1, MMA)


@gluon.jit
def store_rows(ptr, row0, x, n_ok, D: gl.constexpr, first: gl.constexpr, MMA: gl.constexpr):
    """x [channels, N] -> ptr[row0 + n, first + channel]"""
    n = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, MMA))
    c = first + gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, MMA))
    gl.store(ptr + (row0 + n[None, :]) * D + c[:, None], x, mask=(n < n_ok)[None, :])


@gluon.jit
def finish_scores(
    s,
    t,
    t_end,
    pos,
    mask_ptr,
    row,
    mask_h,
    mask_q,
    mask_t,
    cap,
    MASK: gl.constexpr,
    SOFTCAP: gl.constexpr,
    ROWS: gl.constexpr,
    Q: gl.constexpr,
    MMA: gl.constexpr,
):
    """Soft cap, the caller's mask and the end of the range, on base-2 scores [T, N]. pos: position of token 0."""
    LOG2E: gl.constexpr = 1.4426950408889634
    if SOFTCAP:
        s = cap * LOG2E * (1.0 - 2.0 / (1.0 + exp2(s * (2.0 / cap))))
    if MASK != 0:
        n = row + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, MMA))
        m = gl.load(
            mask_ptr
            + ((n // Q).to(gl.int64) * mask_h + (n % Q) * mask_q)[None, :]
            + (pos + t).to(gl.int64)[:, None] * mask_t,
            mask=(t < t_end)[:, None] & (n < ROWS)[None, :],
            other=0,
        )
        if MASK == 1:
            s = gl.where(m != 0, s, -float("inf"))
        else:
            s = s + m.to(gl.float32) * LOG2E
    return s


@gluon.jit
def _edge_dense(dst, ptr, first, stop, D: gl.constexpr):
    """Full-precision tokens first ... (below stop, else 0) to shared memory, asynchronously: [32, D]."""
    L: gl.constexpr = _copy_layout(D, 8)
    t = first + gl.arange(0, 32, layout=gl.SliceLayout(1, L))
    c = gl.arange(0, D, layout=gl.SliceLayout(0, L))
    async_load(dst, ptr + t.to(gl.int64)[:, None] * D + c[None, :], mask=(t < stop)[:, None])
    async_copy.commit_group()


@gluon.jit
def _edge_packed(
    dst,
    w_ptr,
    s_ptr,
    m_ptr,
    first,
    stop,
    BITS: gl.constexpr,
    W: gl.constexpr,
    CHANNEL: gl.constexpr,
    D: gl.constexpr,
    G: gl.constexpr,
):
    """Packed tokens first ... (below stop, else 0), dequantized, to shared memory: [32, D], two rows at a time."""
    SX: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    L: gl.constexpr = gl.BlockedLayout([1, D // 32], [1, 32], [1, 1], [1, 0])
    pair = rows_of_two(dst, D, SX)
    c = gl.arange(0, D, layout=gl.SliceLayout(0, L))[None, :]
    for r in range(16):
        t = (first + 2 * r + gl.arange(0, 2, layout=gl.SliceLayout(1, L))).to(gl.int64)[:, None]
        ok = (t < stop) & (c < D)
        word = gl.load(w_ptr + t * W + c % W, mask=ok, other=0).to(gl.int32)
        code = (word >> (c // W * BITS)) & ((1 << BITS) - 1)
        if CHANNEL:
            o = (t // G) * D + c
        else:
            o = t * (D // G) + c // G
        x = code.to(gl.float32) * gl.load(s_ptr + o, mask=ok, other=0.0).to(gl.float32)
        x += gl.load(m_ptr + o, mask=ok, other=0.0).to(gl.float32)
        pair.index(r).store(x.to(dst.dtype))


@gluon.jit
def load_full_tile(
    dst,
    sink,
    res,
    w_ptr,
    s_ptr,
    m_ptr,
    first,
    stop,
    n_sink,
    n_packed,
    BITS: gl.constexpr,
    W: gl.constexpr,
    CHANNEL: gl.constexpr,
    D: gl.constexpr,
    G: gl.constexpr,
):
    """Positions first ... stop, all of one kind. Packed tokens and the residual count from their own first token."""
    if first < n_sink:
        _edge_dense(dst, sink, first, stop, D)
    else:
        if first < n_sink + n_packed:
            _edge_packed(dst, w_ptr, s_ptr, m_ptr, first - n_sink, stop - n_sink, BITS, W, CHANNEL, D, G)
        else:
            _edge_dense(dst, res, first - n_sink - n_packed, stop - n_sink - n_packed, D)
    async_copy.wait_group(0)
    gl_barrier()


@constexpr_function
def row_layout(mma):
    return gl.BlockedLayout([1, 1], [4, 8], [1, 1], [1, 0])


@constexpr_function
def scale_layout(BT, NC):
    """[BT, NC]: tokens as a dot's second operand holds its rows, all the groups of a token in one thread."""
    regs = [[0, 1 << i] for i in range(NC.bit_length() - 1)]
    regs = [[1, 0]] + regs + [[8, 0]] + [[1 << i, 0] for i in range(4, BT.bit_length() - 1)]
    lanes = [[2, 0], [4, 0], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [], [], [BT, NC])


@gluon.jit
def split_columns(x, T: gl.constexpr, C: gl.constexpr):
    """[T, C] -> C tensors [T] (C a power of two)."""
    if C == 1:
        return (x.reshape([T]),)
    else:
        a, b = gl.split(x.reshape([T, C // 2, 2]))
        a = split_columns(a, T, C // 2)
        b = split_columns(b, T, C // 2)
        out = ()
        for i in gl.static_range(C // 2):
            out = out + (a[i], b[i])
        return out


@gluon.jit
def row_blocks(x, C: gl.constexpr, A: gl.constexpr):
    """[C * R, T] -> C tensors [R, T] (C a power of two), all first operands of a dot."""
    if C == 1:
        return (gl.convert_layout(x, A, assert_trivial=True),)
    else:
        R: gl.constexpr = x.shape[0] // 2
        a, b = gl.split(x.reshape([2, R, x.shape[1]]).permute(1, 2, 0))
        return row_blocks(a, C // 2, A) + row_blocks(b, C // 2, A)
