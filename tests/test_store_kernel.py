"""New keys and values stored in one launch, against appending them one after the other."""

import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined

from kivicache.buffer import TokenBuffer
from kivicache.triton.store import store_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def steps(dtype, widths, layout):
    """Both buffers after several steps, as the kernel and as ``append`` leaves them."""
    ours, theirs = ([TokenBuffer(torch.empty(2, 3, 0, w, dtype=dtype, device=DEVICE)) for w in widths] for _ in "ab")
    for tokens in (1, 1, 7, 1, 16, 2):
        states = [torch.randn(2, 3, tokens, w, device=DEVICE).to(dtype) for w in widths]
        if layout == "transposed":  # as a model's projections come
            states = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in states]
        elif layout == "across":
            states = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in states]
        store_tokens(*ours, *states)
        for buffer, x in zip(theirs, states, strict=True):
            buffer.append(x)
        if tokens == 7:
            for buffer in (*ours, *theirs):
                buffer.pop(5)
    return ours, theirs


@pytest.mark.parametrize("widths", [(64, 64), (80, 128), (100, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "across"])
def test_stores_what_append_does(widths, dtype, layout):
    ours, theirs = steps(dtype, widths, layout)
    for buffer, expected in zip(ours, theirs, strict=True):
        assert len(buffer) == 23 and torch.equal(buffer.read(), expected.read())


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "across"])
def test_gpu_stores_what_append_does(layout):
    for widths in ((128, 128), (80, 128)):
        ours, theirs = steps(torch.bfloat16, widths, layout)
        assert all(torch.equal(x.read(), y.read()) for x, y in zip(ours, theirs, strict=True))
