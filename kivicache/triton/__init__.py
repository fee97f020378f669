"""The fused kernels, in Triton. Nothing here imports triton before a kernel is asked for: it is optional."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch


@functools.cache
def missing_triton() -> tuple[str, ...]:
    """The reason why no kernel can run here; empty where triton is installed."""
    return () if find_spec("triton") else ('triton is not installed: pip install "kivicache[triton]"',)


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, on which kernels are launched."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def serves(device: torch.device) -> bool:
    """Whether the kernels can run on ``device``."""
    return device.type == "cuda" and not missing_triton()
