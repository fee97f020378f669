"""The Hadamard rotation of rotation.py along head_dim, as a kernel and as a device function."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import constexpr_function

from kivicache.rotation import rotation_block

BLOCK_R = 4  # rows of a program: a decode step has few, and each is some hundred bytes


@constexpr_function
def _norm(block):
    return 1 / math.sqrt(block)


@triton.jit
def hadamard_rows(x, BLOCK: tl.constexpr):
    """Rows [R, D] of float32 turned in blocks of BLOCK channels (both powers of two), as rotation.hadamard does."""
    R: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    tl.static_assert(BLOCK <= 1024)
    for step in tl.static_range(10):
        if (1 << step) < BLOCK:
            pairs = tl.permute(tl.reshape(x, [R, D >> (step + 1), 2, 1 << step]), [0, 1, 3, 2])
            a, b = tl.split(pairs)
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [R, D])
    return x * _norm(BLOCK)


@triton.jit
def rotate_kernel(
    x_ptr,  # [rows, D]
    out_ptr,  # [rows, D]
    rows,
    D: tl.constexpr,
    ROTATION_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program: BLOCK_R rows."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    ok = (r < rows)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + r[:, None] * D + d[None, :], mask=ok, other=0.0).to(tl.float32)
    x = hadamard_rows(x, ROTATION_BLOCK)
    tl.store(out_ptr + r[:, None] * D + d[None, :], x.to(out_ptr.dtype.element_ty), mask=ok)


def rotate(states: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Triton twin of ``rotation.hadamard``, computed in float32.

    Args:
        states: ``[..., head_dim]``, contiguous.
        dtype: of the result, default that of ``states``.
    """
    D = states.shape[-1]
    rows = states.numel() // D
    out = torch.empty(states.shape, dtype=dtype or states.dtype, device=states.device)
    if rows:
        rotate_kernel[(triton.cdiv(rows, BLOCK_R),)](
            states,
            out,
            rows,
            D=D,
            ROTATION_BLOCK=rotation_block(D),
            BLOCK_R=BLOCK_R,
            BLOCK_D=triton.next_power_of_2(D),
            num_warps=1,
        )
    return out
