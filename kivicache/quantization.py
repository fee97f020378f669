"""KIVI's arithmetic in torch: asymmetric min-max quantization of groups (arXiv 2402.02750, section 3.2).

Per group of G values: ``minimum = min(x)``, ``scale = (max(x) - min(x)) / (2**nbits - 1)``,
``code = clamp(round((x - minimum) / scale), 0, 2**nbits - 1)``, and back: ``x' = code * scale + minimum``.

``axis`` says what a group runs along, in the paper's words:

- ``"channel"`` (KIVI's keys): G consecutive tokens of one channel of one head;
  scale and minimum are ``[batch, heads, tokens / G, head_dim]``.
- ``"token"`` (KIVI's values): G consecutive channels of one token of one head, the last group shorter where G does
  not divide head_dim; scale and minimum are ``[batch, heads, tokens, ceil(head_dim / G)]``.

Scale and minimum are kept in float16, also for bfloat16 models: at 8 bits the eight mantissa bits of bfloat16 would
cost more than the code does. The codes are chosen for the *stored* scale and minimum, which makes up for most of their
rounding; a range below float16's smallest step becomes one constant. Magnitudes beyond float16's 65504 saturate. A
group that holds a NaN or an infinity reads back as NaN, all of it and nothing but it: the fault stays visible and out
of its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

METADATA_DTYPE = torch.float16
_METADATA_MAX = torch.finfo(METADATA_DTYPE).max


def quantize(states: Tensor, nbits: int, group_size: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize keys or values by their groups' minimum and maximum.

    Args:
        states: ``[batch, heads, tokens, head_dim]``, any floating dtype; computed in float32.
        nbits: 2, 4 or 8.
        group_size: values per group; ``axis="channel"`` needs it to divide ``tokens``.
        axis: ``"channel"`` or ``"token"``, see the module's text.

    Returns:
        codes: uint8, the shape of ``states``.
        scale, minimum: float16, one per group.
    """
    groups, dim = _group(states.float(), group_size, axis)
    low, high = groups.aminmax(dim=dim)
    minimum = to_metadata(low)
    # divided by a tensor: by a number, a GPU multiplies with its reciprocal, and the last bit depends on the device
    scale = to_metadata((high - low) / torch.full_like(high, 2**nbits - 1))
    # a non-finite value anywhere in the group makes both ends' difference non-finite
    minimum = torch.where((high - low).isfinite(), minimum, torch.nan)
    codes = encode(states, scale, minimum, nbits, group_size, axis)
    return codes, scale, minimum


def encode(states: Tensor, scale: Tensor, minimum: Tensor, nbits: int, group_size: int, axis: str) -> Tensor:
    """The nearest code of every value for a scale and minimum already chosen: uint8, the shape of ``states``."""
    scale, minimum = (_ungroup(x.float(), states.shape, group_size, axis) for x in (scale, minimum))
    # scale 0: a constant group, whose every code is 0 and reads back as the minimum
    codes = ((states.float() - minimum) / torch.where(scale == 0, 1.0, scale)).round_()
    return codes.nan_to_num_(0.0).clamp_(0, 2**nbits - 1).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, minimum: Tensor, group_size: int, axis: str) -> Tensor:
    """``codes * scale + minimum`` in float32, the shape of ``codes``."""
    scale, minimum = (_ungroup(x.float(), codes.shape, group_size, axis) for x in (scale, minimum))
    return codes.float().mul_(scale).add_(minimum)


def _group(states: Tensor, group_size: int, axis: str) -> tuple[Tensor, int]:
    """View ``states`` with one more dimension that runs within a group, and say which it is."""
    if axis == "channel":
        return states.unflatten(2, (-1, group_size)), 3
    missing = -states.shape[3] % group_size
    if missing:  # repeat the last channel: unlike any other padding it cannot widen the ragged group's range
        states = torch.cat([states, states[..., -1:].expand(*states.shape[:3], missing)], dim=3)
    return states.unflatten(3, (-1, group_size)), 4


def _ungroup(per_group: Tensor, shape: torch.Size, group_size: int, axis: str) -> Tensor:
    """Repeat a per-group tensor to one entry per value of ``shape``."""
    dim = 2 if axis == "channel" else 3
    repeated = per_group.unsqueeze(dim + 1).expand(
        *per_group.shape[: dim + 1], group_size, *per_group.shape[dim + 1 :]
    )
    return repeated.flatten(dim, dim + 1)[..., : shape[3]]


def to_metadata(x: Tensor) -> Tensor:
    """A scale or minimum as it is stored: float16, beyond its range the nearest finite number."""
    return x.clamp(-_METADATA_MAX, _METADATA_MAX).to(METADATA_DTYPE)
