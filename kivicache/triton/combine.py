"""Merge the splits of the decode attention by their log-sum-exp."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kivicache.rotation import rotation_block
from kivicache.triton.launch import Launcher
from kivicache.triton.rotate import hadamard_rows

TILE = 4096  # values at a time: splits x channels, 32 of them in a thread's registers


@triton.jit(do_not_specialize=["n_splits", "n_exact"], do_not_specialize_on_alignment=["lse_ptr", "aux_ptr"])
def combine_kernel(
    o_ptr,  # float32 [B * H, splits, ROWS, D]
    lse_ptr,  # float32 [B * H, splits, ROWS], base 2, -inf for a split with no token
    aux_ptr,  # [query heads], when AUX: one more score, natural
    out_ptr,  # [B * H, ROWS, D]
    n_splits,
    n_exact,  # splits before this one hold values that are not rotated, when ROTATION_BLOCK
    H: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    AUX: tl.constexpr,
    ROTATION_BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program: BLOCK_D channels of one row."""
    i_h = tl.program_id(0).to(tl.int64)
    i_r = tl.program_id(1)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = -float("inf")
    l = 0.0
    if AUX:
        m = tl.load(aux_ptr + (i_h % H) * (ROWS // Q) + i_r // Q).to(tl.float32) * 1.4426950408889634
        l = 1.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    exact = tl.zeros([BLOCK_D], tl.float32)
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
        if ROTATION_BLOCK:
            exact = exact * alpha + tl.sum(tl.where(s < n_exact, p, 0.0)[:, None] * o, 0)
            p = tl.where(s < n_exact, 0.0, p)
        acc = acc * alpha + tl.sum(p[:, None] * o, 0)
        m = m_new
    if ROTATION_BLOCK:
        acc = exact + tl.reshape(hadamard_rows(tl.reshape(acc, [1, BLOCK_D]), ROTATION_BLOCK), [BLOCK_D])
    out = acc / tl.where(l == 0, 1.0, l)
    tl.store(out_ptr + (i_h * ROWS + i_r) * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def combine_splits(
    partials: Tensor,
    query: Tensor,
    kv_heads: int,
    width: int,
    n_splits: int,
    n_exact: int | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """The merged output ``[batch, query heads, query tokens, width]``, of the query's dtype.

    Args:
        partials: float32, ``[batch * kv_heads, splits, rows, width]`` outputs and behind them their log-sum-exp.
        query: ``[batch, query heads, query tokens, head_dim]``.
        n_exact: the splits from this one on hold rotated values; None: none do.
        s_aux: ``[query heads]``, see decode.py.
    """
    batch, query_heads, query_length, _ = query.shape
    heads, rows = batch * kv_heads, query_heads // kv_heads * query_length
    out = torch.empty((batch, query_heads, query_length, width), dtype=query.dtype, device=query.device)
    s_aux = None if s_aux is None else s_aux.contiguous()
    # a program: a row, or where there are few rows, 32 of its channels; a rotation mixes all channels of a row
    whole = n_exact is not None or heads * rows >= 256
    launcher = _launcher(kv_heads, query_length, rows, width, s_aux is not None, n_exact is not None, whole)
    launcher(
        (heads, rows, -(-width // launcher.constants["BLOCK_D"])),
        (partials, partials[heads * n_splits * rows * width :], partials if s_aux is None else s_aux, out),
        (n_splits, n_exact or 0),
        (query.device.index, query.dtype, None if s_aux is None else s_aux.dtype),
    )
    return out


@functools.lru_cache
def _launcher(
    kv_heads: int, query_length: int, rows: int, width: int, aux: bool, rotated: bool, whole: bool
) -> Launcher:
    block_d = triton.next_power_of_2(width) if whole else 32
    constants = {
        "H": kv_heads,
        "Q": query_length,
        "ROWS": rows,
        "D": width,
        "AUX": aux,
        "ROTATION_BLOCK": rotation_block(width) if rotated else 0,
        "BLOCK_S": TILE // block_d,
        "BLOCK_D": block_d,
    }
    return Launcher(combine_kernel, constants, num_warps=4)
