"""The kernel of a fixed-capacity step against its torch twin, bit for bit."""

import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined

from kivicache.backends import get_backend
from kivicache.config import LayerConfig
from kivicache.fixed_attention import append_step
from kivicache.fixed_states import KEYS, REFUSED, SINKS, TOTAL, VALUES, FixedStates
from kivicache.packing import pack
from kivicache.quantization import dequantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {  # name: (head_dim, dtype, config)
    "default": (64, torch.float16, {"residual_length": 32}),
    "2_bits": (32, torch.float16, {"nbits_key": 2, "residual_length": 8, "sink_length": 5}),
    "8_bits": (80, torch.float32, {"nbits_key": 8, "nbits_value": 8, "group_size": 8, "sink_length": 0}),
    "per_token": (32, torch.float32, {"group_size": -1, "residual_length": 0, "sink_length": 40}),
    "rotated": (32, torch.bfloat16, {"nbits_key": 2, "rotation": "hadamard", "sink_length": 5}),
    "rotated_blocks": (80, torch.float32, {"rotation": "hadamard", "group_size": 24, "residual_length": 40}),
    "swapped": (
        32,
        torch.bfloat16,
        {"axis_key": "token", "axis_value": "channel", "group_size": 16, "sink_length": 0},
    ),
}


def stores(config, like, capacity):
    bits = (config.nbits_key, config.nbits_value)
    lengths = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    heads = like.shape[1]
    return *(FixedStates(like, [bits[n - KEYS]] * heads, n, config, capacity) for n in (KEYS, VALUES)), lengths


def content(store, lengths):
    """All that counts: sinks, packed bytes, and exact tokens."""
    sinks, packed, total = (int(lengths[n]) for n in (SINKS, store.format.length, TOTAL))
    groups = packed // store.format.tokens_per_group
    bounds = (sinks, total - sinks - packed, packed, groups, groups)
    return [tensor[:, :, :bound] for tensor, bound in zip(store.tensors, bounds, strict=True)]


@pytest.mark.parametrize(("head_dim", "dtype", "settings"), CASES.values(), ids=CASES)
def test_the_kernel_stores_what_torch_stores(head_dim, dtype, settings):
    kernel_and_torch_agree(head_dim, dtype, settings)


def test_the_default_dtype_changes_nothing():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        kernel_and_torch_agree(*CASES["rotated"])
    finally:
        torch.set_default_dtype(before)


def kernel_and_torch_agree(head_dim, dtype, settings):
    config = LayerConfig(**{"residual_length": 16, **settings})
    like = torch.empty(1, 2, 0, head_dim, dtype=dtype, device=DEVICE)
    expected, given = stores(config, like, 150), stores(config, like, 150)
    for step, tokens in enumerate([16, 16, 1, 9, 16, 1, 16, 16, 2, 1, 16, 16, 3, 16, 16, 1]):
        # strided as a model's are: [batch, tokens, heads, head_dim], transposed
        key_states, value_states = torch.randn(2, 1, tokens, 2, head_dim, dtype=dtype, device=DEVICE).transpose(2, 3)
        for target, kernels in ((expected, False), (given, True)):
            append_step(*target, key_states, value_states, kernels)
        assert torch.equal(given[2], expected[2]), (step, given[2], expected[2])
        for side in range(2):
            for tensor, expected_tensor in zip(
                content(given[side], given[2]), content(expected[side], expected[2]), strict=True
            ):
                assert torch.equal(tensor.view(torch.uint8), expected_tensor.view(torch.uint8)), step
    assert int(expected[2][REFUSED]) > 0 and int(expected[2][KEYS]) > 0  # it was full, and packed something


LEAST_SQUARES = {  # (head_dim, group_size, axes, bits)
    "2_bits": (32, 32, ("channel", "token"), (2, 2)),
    "groups_that_do_not_fill_a_tile": (48, 24, ("channel", "token"), (4, 2)),
    "a_last_group_that_is_shorter": (112, 64, ("channel", "token"), (2, 2)),
    "a_group_that_is_never_full": (96, 128, ("token", "token"), (2, 4)),
    "swapped": (32, 16, ("token", "channel"), (2, 2)),
}


@pytest.mark.parametrize(("head_dim", "group_size", "axes", "nbits"), LEAST_SQUARES.values(), ids=LEAST_SQUARES)
def test_least_squares_in_the_kernel(head_dim, group_size, axes, nbits):
    """Codes are the nearest for the stored scale and minimum, and their error is that of the backend's own ranges."""
    config = LayerConfig(
        backend="mse",
        nbits_key=nbits[0],
        nbits_value=nbits[1],
        group_size=group_size,
        axis_key=axes[0],
        axis_value=axes[1],
        residual_length=0,
        sink_length=0,
    )
    like = torch.empty(1, 2, 0, head_dim, device=DEVICE)
    *given, lengths = stores(config, like, 600)
    tokens = -(-64 // config.block_length) * config.block_length
    both = torch.randn(2, 1, 2, tokens, head_dim, device=DEVICE) + 3 * torch.randn(head_dim, device=DEVICE)
    both[:, :, 0, :, 3] = 1.5  # constant groups along a channel
    both[1, :, 1, 5] = torch.inf
    for first in range(0, tokens, 8):
        append_step(*given, lengths, both[0, :, :, first : first + 8], both[1, :, :, first : first + 8], True)
    append_step(*given, lengths, both[0, :, :, :1], both[1, :, :, :1], True)
    assert int(lengths[KEYS]) == tokens
    for states, store, bits, axis in zip(both, given, nbits, axes, strict=True):
        _, _, words, scale, minimum = content(store, lengths)
        codes, *expected = get_backend("mse").quantize(states, bits, group_size, axis)
        own = get_backend("native").quantize(states, bits, group_size, axis)
        assert torch.equal(minimum.isnan(), expected[1].isnan())
        read, wanted, min_max = (
            dequantize(c, *m, group_size, axis)
            for c, m in (
                (nearest(states, scale, minimum, bits, group_size, axis), (scale, minimum)),
                (codes, expected),
                (own[0], own[1:]),
            )
        )
        assert torch.equal(words, pack(nearest(states, scale, minimum, bits, group_size, axis), bits))
        read, wanted, min_max = ((x - states).nan_to_num(0).square().sum() for x in (read, wanted, min_max))
        assert abs(read / wanted - 1) < 1e-2 and read < 0.95 * min_max


def nearest(states, scale, minimum, nbits, group_size, axis):
    """The nearest codes, by the distance of every one; 0 where the group is not finite."""
    levels = [
        dequantize(torch.full(states.shape, code, dtype=torch.uint8, device=DEVICE), scale, minimum, group_size, axis)
        for code in range(2**nbits)
    ]
    return (torch.stack(levels) - states).abs().nan_to_num(0).argmin(0).to(torch.uint8)
