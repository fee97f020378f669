"""The kernels that pack and unpack against the torch code, bit for bit.

Without a GPU they run in Triton's interpreter.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined

from kivicache.packing import pack, unpack
from kivicache.quantization import dequantize, quantize
from kivicache.triton.pack import quantize_pack
from kivicache.triton.unpack import unpack_dequantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FORMATS = [("channel", 32), ("channel", 16), ("token", 32), ("token", 64), ("token", 128), ("token", 24)]


def states_with_faults(batch, heads, tokens, head_dim, dtype):
    """Random states with constant groups, many ties, NaN, infinities and what float16 cannot hold."""
    states = torch.randn(batch, heads, tokens, head_dim, device=DEVICE) * 3
    states[0, 0, :, 3] = 1.5
    states[0, 0, 5] = 0
    states[0, -1] = (states[0, -1] * 2).round() / 2  # quotients of one half
    states[-1, 0, 7, 9] = torch.nan
    states[-1, 0, 9, 11] = torch.inf
    states[-1, 0, 10, 12] = -torch.inf
    states[-1, 0, :, 13] *= 60000
    states[-1, 0, 13] *= 1e-6
    return states.to(dtype)


def same(x, y):
    """Equal bit for bit, one NaN as good as another."""
    return x.dtype == y.dtype and torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(0), y.nan_to_num(0))


def check(states, nbits, group_size, axis):
    codes, scale, minimum = quantize(states, nbits, group_size, axis)
    expected = pack(codes, nbits)
    words, own_scale, own_minimum = quantize_pack(states, nbits, group_size, axis)
    assert same(own_scale, scale) and same(own_minimum, minimum)
    assert torch.equal(words, expected)
    # Triton's interpreter cuts float32 off where bfloat16 is to be rounded
    dtype = torch.float32 if DEVICE == "cpu" and states.dtype == torch.bfloat16 else states.dtype
    restored = torch.full(states.shape, 7, dtype=dtype, device=DEVICE)
    unpack_dequantize(words, scale, minimum, nbits, group_size, axis, restored)
    dense = dequantize(unpack(words, nbits, states.shape[3]), scale, minimum, group_size, axis)
    assert same(restored, dense.to(dtype))


@pytest.mark.parametrize("nbits", [2, 4, 8])
@pytest.mark.parametrize(("axis", "group_size"), FORMATS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, DTYPES[0]), (80, DTYPES[1]), (100, DTYPES[2]), (128, DTYPES[1])])
def test_the_very_same_words(nbits, axis, group_size, head_dim, dtype):
    tokens = 32 if axis == "channel" else 19
    check(states_with_faults(2, 1, tokens, head_dim, dtype), nbits, group_size, axis)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_rows_apart_and_no_tokens(axis):
    """States need not be contiguous: a model's keys are a transposed view."""
    states = states_with_faults(2, 2, 32, 64, torch.float16).transpose(1, 2).contiguous().transpose(1, 2)
    check(states, 4, 32, axis)
    check(states.transpose(2, 3).contiguous().transpose(2, 3), 4, 32, axis)
    words, scale, minimum = quantize_pack(states[:, :, :0], 4, 32, axis)
    assert words.shape == (2, 2, 0, 16) and scale.shape[2] == minimum.shape[2] == 0


def test_into_a_larger_store():
    states = states_with_faults(1, 2, 32, 64, torch.float16)
    room = (
        torch.full((1, 2, 96, 8), -7, dtype=torch.int16, device=DEVICE),
        torch.full((1, 2, 3, 64), 7.0, dtype=torch.float16, device=DEVICE),
        torch.full((1, 2, 3, 64), 7.0, dtype=torch.float16, device=DEVICE),
    )
    quantize_pack(states, 2, 32, "channel", out=(room[0][:, :, 32:64], room[1][:, :, 1:2], room[2][:, :, 1:2]))
    alone = quantize_pack(states, 2, 32, "channel")
    assert torch.equal(room[0][:, :, 32:64], alone[0]) and (room[0][:, :, :32] == -7).all()
    assert same(room[1][:, :, 1:2], alone[1]) and (room[1][:, :, ::2] == 7).all()
    assert same(room[2][:, :, 1:2], alone[2]) and (room[2][:, :, ::2] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("nbits", [2, 4, 8])
@pytest.mark.parametrize(("axis", "group_size"), [*FORMATS, ("channel", 64), ("channel", 128), ("token", 256)])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 100, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_the_very_same_words(nbits, axis, group_size, head_dim, dtype):
    tokens = 1024 if axis == "channel" else 1003
    check(states_with_faults(2, 4, tokens, head_dim, dtype), nbits, group_size, axis)


@pytest.mark.gpu
@pytest.mark.parametrize("nbits", [2, 4, 8])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_gpu_every_tie(nbits, axis):
    """Quotients on and next to one half, for many scales: where a division by other means would differ."""
    scale = torch.rand(1, 8, 4096, 1, device=DEVICE).half().float() + 2**-10
    codes = torch.randint(0, 2**nbits, (1, 8, 4096, 128), device=DEVICE) + 0.5
    states = codes * scale
    states = torch.where(torch.rand_like(states) < 0.5, states, states.nextafter(torch.rand_like(states) * 1e4 - 5e3))
    states[..., 0::32], states[..., 1::32] = 0, scale * (2**nbits - 1)
    if axis == "channel":
        states = states.unflatten(2, (128, 32)).unflatten(4, (4, 32)).transpose(3, 5).flatten(4, 5).flatten(2, 3)
    check(states.contiguous(), nbits, 32, axis)
