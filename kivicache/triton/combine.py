"""Merge the splits of decode.py by their log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def combine_kernel(
    o_ptr,  # float32 [heads, splits, ROWS, D]
    lse_ptr,  # float32 [heads, splits, ROWS], base 2, -inf for a split with no token
    out_ptr,  # [heads, ROWS, D]
    n_splits,
    ROWS,
    D,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program: BLOCK_D channels of one row."""
    i_h = tl.program_id(0).to(tl.int64)
    i_r = tl.program_id(1)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = -float("inf")
    l = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for s0 in range(0, n_splits, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        row = (i_h * n_splits + s) * ROWS + i_r
        lse = tl.load(lse_ptr + row, mask=s < n_splits, other=-float("inf"))
        o = tl.load(o_ptr + row[:, None] * D + d[None, :], mask=(s < n_splits)[:, None] & (d < D)[None, :], other=0.0)
        m_new = tl.maximum(m, tl.max(lse, 0))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)  # no token so far: exp2(-inf - 0), not exp2(-inf + inf)
        alpha = tl.exp2(m - base)
        p = tl.exp2(lse - base)
        l = l * alpha + tl.sum(p, 0)
        acc = acc * alpha + tl.sum(p[:, None] * o, 0)
        m = m_new
    out = acc / tl.where(l == 0, 1.0, l)
    tl.store(out_ptr + (i_h * ROWS + i_r) * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def combine_splits(o: Tensor, lse: Tensor, query: Tensor) -> Tensor:
    """Merged output, of the shape and dtype of query ``[B, query heads, Q, D]``; o ``[B * H, splits, rows, D]``."""
    heads, n_splits, rows, D = o.shape
    out = torch.empty_like(query)
    # a program: a row, or where there are few rows, 32 of its channels
    block_d = triton.next_power_of_2(D) if heads * rows >= 256 else min(32, triton.next_power_of_2(D))
    block_s = max(2, min(triton.next_power_of_2(n_splits), 8192 // block_d))
    combine_kernel[(heads, rows, triton.cdiv(D, block_d))](
        o, lse, out, n_splits, rows, D, block_s, block_d, num_warps=4
    )
    return out
