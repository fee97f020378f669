"""[`Launcher`]: one specialization of a kernel, launched at every decode step.

Triton inspects every argument at every launch, which for a kernel of sixty costs more host time than PyTorch's whole
attention. What it inspects does not change here from step to step, so the compiled kernel is kept and given the bare
addresses and numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from kivicache.buffer import TokenBuffer


class Launcher:
    """Launches ``kernel`` with the same constants each time.

    The kernel's parameters are pointers, numbers and constants, in this order; numbers that Triton may not specialize
    on are declared so by the kernel, and the others (strides) are multiples of 16 at every call.
    """

    def __init__(self, kernel: Any, constants: Mapping[str, Any], **options: Any):
        self.kernel, self.constants, self.options = kernel, dict(constants), options
        self._values = tuple(self.constants.values())
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        pointers: Sequence[Tensor | TokenBuffer],
        numbers: Sequence[float],
        kind: Hashable,
    ) -> None:
        """Launch on the current device and stream; ``kind`` tells the device and the dtypes of the pointers apart."""
        key = kind, max(numbers) < 2**31  # of larger numbers Triton makes 64-bit parameters
        compiled = self._compiled.get(key)
        if compiled is None:
            tensors = (x.read() if isinstance(x, TokenBuffer) else x for x in pointers)
            # nothing is compiled where the interpreter runs
            self._compiled[key] = self.kernel[grid](*tensors, *numbers, **self.constants, **self.options)
        else:
            compiled[grid](*[x.data_ptr() for x in pointers], *numbers, *self._values)
