"""Ranges of least squared error: min-max, or a narrower range refitted to its codes where that reads back closer.

At 2 bits, four levels between a group's extremes leave most values far from any; giving up the extremes a little pays.
What is stored and read has the same form, so it costs nothing after packing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kivicache.backends.base import LibraryBackend

STARTS = 3
NARROWING = 0.15  # start i gives up i times as much of the range, half at each end
ROUNDS = 4


class MSEBackend(LibraryBackend, name="mse"):
    """From each start, alternate the nearest codes and the least-squares scale and minimum for them; keep the best."""

    def fit(self, rows: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
        low, high = rows.aminmax(dim=1, keepdim=True)
        best_scale, best_minimum = (high - low) / (2**nbits - 1), low
        best_error = _error(rows, best_scale, best_minimum, nbits)
        for start in range(STARTS):
            narrowing = start * NARROWING
            scale = (high - low) * ((1 - narrowing) / (2**nbits - 1))
            minimum = low + (high - low) * (narrowing / 2)
            for _ in range(ROUNDS):
                scale, minimum = _least_squares(rows, _codes(rows, scale, minimum, nbits), scale, minimum)
            error = _error(rows, scale, minimum, nbits)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_minimum = torch.where(better, minimum, best_minimum)
        return best_scale, best_minimum


def _codes(rows: Tensor, scale: Tensor, minimum: Tensor, nbits: int) -> Tensor:
    return ((rows - minimum) / torch.where(scale == 0, 1.0, scale)).round_().clamp_(0, 2**nbits - 1)


def _error(rows: Tensor, scale: Tensor, minimum: Tensor, nbits: int) -> Tensor:
    read = _codes(rows, scale, minimum, nbits).mul_(scale).add_(minimum)
    return read.sub_(rows).square_().mean(dim=1, keepdim=True)


def _least_squares(rows: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    mean_code, mean = codes.mean(dim=1, keepdim=True), rows.mean(dim=1, keepdim=True)
    centred = codes - mean_code
    spread = centred.square().sum(dim=1, keepdim=True)
    slope = (centred * (rows - mean)).sum(dim=1, keepdim=True) / torch.where(spread == 0, 1.0, spread)
    some = spread > 0
    return torch.where(some, slope, scale), torch.where(some, mean - slope * mean_code, minimum)
