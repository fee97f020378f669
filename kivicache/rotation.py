"""The Hadamard rotation along head_dim: it spreads an outlier channel over its neighbours before quantization.

Attention does not notice it: query and keys turned together keep their scores, ``(Hq).(Hk) = q.k`` (QuaRot, arXiv
2404.00456). The transform is orthonormal and its own inverse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotation_block(head_dim: int) -> int:
    """The largest power of two that divides ``head_dim``: the rotation works in blocks of that many channels.

    128 turns as one block, 80 as five blocks of 16.

    Raises:
        ValueError: for an odd ``head_dim``, where a block would be a single channel and nothing would turn.
    """
    block = head_dim & -head_dim
    if block == 1:
        raise ValueError(f'rotation: got "hadamard" for head_dim {head_dim}; allowed: an even head_dim')
    return block


def hadamard(states: Tensor) -> Tensor:
    """Rotate the last dimension in blocks of [`rotation_block`] channels; applying it twice gives ``states`` back.

    Done as additions and subtractions (the fast Walsh-Hadamard transform), not as a matrix product, whose rounding
    would depend on how many tokens are rotated at once.

    Args:
        states: float32 ``[..., head_dim]``.
    """
    block = rotation_block(states.shape[-1])
    half = 1
    while half < block:
        a, b = states.unflatten(-1, (-1, 2, half)).unbind(-2)
        states = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return states * (1 / math.sqrt(block))  # the kernels multiply with the same number, bit for bit
