"""Ranges of least squared error, as a device function: the arithmetic of backends/mse.py, sums in another order."""

from __future__ import annotations

import triton
import triton.language as tl

from kivicache.triton.pack import FLOAT32_MAX, _bounded, _encode


@triton.jit
def _codes(x, ok, scale, minimum, DIM: tl.constexpr, LEVELS: tl.constexpr):
    """The nearest codes of the values that are ok, in float32; 0 for the others."""
    code = _encode(x, tl.expand_dims(scale, DIM), tl.expand_dims(minimum, DIM), LEVELS) & 0xFFFF
    return tl.where(ok, code.to(tl.float32), 0.0)


@triton.jit
def _squared_error(x, ok, scale, minimum, DIM: tl.constexpr, LEVELS: tl.constexpr):
    read = _codes(x, ok, scale, minimum, DIM, LEVELS) * tl.expand_dims(scale, DIM) + tl.expand_dims(minimum, DIM)
    return tl.sum(tl.where(ok, (read - x) * (read - x), 0.0), DIM)


@triton.jit
def least_squares_range(
    x,
    ok,
    low,
    high,
    DIM: tl.constexpr,
    LEVELS: tl.constexpr,
    STARTS: tl.constexpr,
    NARROWING: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """float16 scale and minimum of groups along DIM of x; the minimum is NaN where an end is not finite.

    x: float32, two dimensions, its values that are ok. low, high: their ends.
    """
    span = high - low
    finite = span <= FLOAT32_MAX
    ok = ok & tl.expand_dims(finite, DIM)
    x = tl.where(ok, x, 0.0)
    low = tl.where(finite, low, 0.0)
    span = tl.where(finite, span, 0.0)
    count = tl.maximum(tl.sum(ok.to(tl.float32), DIM), 1.0)
    mean = tl.sum(x, DIM) / count
    best_scale = span / LEVELS
    best_minimum = low
    best_error = _squared_error(x, ok, best_scale, best_minimum, DIM, LEVELS)
    for start in range(STARTS):
        narrowing = start * NARROWING
        scale = span * ((1.0 - narrowing) / LEVELS)
        minimum = low + span * (narrowing / 2)
        for _ in range(ROUNDS):
            code = _codes(x, ok, scale, minimum, DIM, LEVELS)
            mean_code = tl.sum(code, DIM) / count
            centred = tl.where(ok, code - tl.expand_dims(mean_code, DIM), 0.0)
            spread = tl.sum(centred * centred, DIM)
            slope = tl.sum(centred * (x - tl.expand_dims(mean, DIM)), DIM) / tl.where(spread == 0.0, 1.0, spread)
            scale = tl.where(spread > 0.0, slope, scale)
            minimum = tl.where(spread > 0.0, mean - slope * mean_code, minimum)
        error = _squared_error(x, ok, scale, minimum, DIM, LEVELS)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best_scale = tl.where(better, scale, best_scale)
        best_minimum = tl.where(better, minimum, best_minimum)
    minimum = tl.where(finite, _bounded(best_minimum), float("nan"))
    return _bounded(best_scale).to(tl.float16), minimum.to(tl.float16)
