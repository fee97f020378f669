import pytest
import torch

from kivicache.quantization import dequantize, encode, quantize
from kivicache.rotation import hadamard, rotation_block
from tests.reference import fake_quantize, quantize_group, rotate

SHAPES = {  # (tokens, head_dim, group_size); -1 stands for one group per token
    "even": (64, 64, 32),
    "head_dim_80": (64, 80, 32),
    "head_dim_96": (64, 96, 64),
    "head_dim_100": (96, 100, 32),
    "head_dim_128": (128, 128, 128),
    "head_dim_256": (64, 256, 64),
    "odd_group": (21, 33, 7),
    "group_of_one": (4, 8, 1),
    "group_wider_than_head": (40, 16, 20),
    "per_token": (5, 80, -1),
}


def states_of(tokens, head_dim, dtype=torch.float32):
    states = torch.randn(2, 3, tokens, head_dim)
    states[:, :, :, :: max(head_dim // 3, 1)] *= 20  # outlier channels, as keys have
    return (states + 5 * torch.randn(head_dim)).to(dtype)


def both_ways(shapes):
    for name, (tokens, head_dim, group) in shapes.items():
        for axis in ("channel", "token"):
            if not (axis == "channel" and group == -1):
                yield pytest.param(tokens, head_dim, group, axis, id=f"{name}-{axis}")


@pytest.mark.parametrize("nbits", [2, 4, 8])
@pytest.mark.parametrize(("tokens", "head_dim", "group_size", "axis"), list(both_ways(SHAPES)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reads_back_as_the_papers_arithmetic(tokens, head_dim, group_size, axis, nbits, dtype):
    states = states_of(tokens, head_dim, dtype)
    size = head_dim if group_size == -1 else group_size
    codes, scale, minimum = quantize(states, nbits, size, axis)
    expected = fake_quantize(states.float(), nbits, group_size, axis)
    assert torch.equal(dequantize(codes, scale, minimum, size, axis), expected)


@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_codes_scale_and_minimum_of_single_groups(nbits):
    states = states_of(64, 80)
    codes, scale, minimum = quantize(states, nbits, 32, "channel")
    for batch, head, group, channel in [(0, 0, 0, 0), (1, 2, 1, 79), (0, 1, 1, 26)]:
        expected = quantize_group(states[batch, head, 32 * group : 32 * group + 32, channel], nbits)
        assert torch.equal(codes[batch, head, 32 * group : 32 * group + 32, channel].float(), expected[0])
        assert scale[batch, head, group, channel] == expected[1]
        assert minimum[batch, head, group, channel] == expected[2]
    codes, scale, minimum = quantize(states, nbits, 32, "token")
    for batch, head, token, group in [(0, 0, 0, 0), (1, 2, 63, 2), (0, 1, 31, 1)]:
        expected = quantize_group(states[batch, head, token, 32 * group : 32 * group + 32], nbits)
        assert torch.equal(codes[batch, head, token, 32 * group : 32 * group + 32].float(), expected[0])
        assert scale[batch, head, token, group] == expected[1]
        assert minimum[batch, head, token, group] == expected[2]


@pytest.mark.parametrize("nbits", [2, 4, 8])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_error_is_at_most_half_a_step(nbits, axis):
    states = states_of(64, 128, torch.float16).float()
    codes, scale, minimum = quantize(states, nbits, 32, axis)
    error = (dequantize(codes, scale, minimum, 32, axis) - states).abs()
    dim = 2 if axis == "channel" else 3
    step = scale.float().repeat_interleave(32, dim)
    ends = 2.0**-11 * (2**nbits - 1) * step  # the scale's own rounding, felt at the top of the range
    assert (error <= step / 2 + ends + 1e-6).all()


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_more_bits_are_not_worse(axis):
    states = states_of(64, 128)
    errors = [(dequantize(*quantize(states, nbits, 32, axis), 32, axis) - states).norm().item() for nbits in (2, 4, 8)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_a_ragged_last_group_has_its_own_range():
    states = torch.rand(1, 1, 4, 100) + 10  # zero padding would stretch the last group down to 0
    codes, scale, minimum = quantize(states, 2, 32, "token")
    assert scale.shape == minimum.shape == (1, 1, 4, 4)
    assert (scale <= 1 / 3 + 1e-3).all() and (minimum >= 9.99).all()
    assert (dequantize(codes, scale, minimum, 32, "token") - states).abs().max() <= 1 / 6 + 0.02


@pytest.mark.parametrize("value", [0.0, 1.5, -300.0])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_constant_groups_read_back_as_their_constant(value, axis):
    states = torch.full((1, 2, 32, 64), value)
    assert torch.equal(dequantize(*quantize(states, 4, 32, axis), 32, axis), states)


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_a_fault_poisons_its_own_group_and_nothing_else(fault, axis):
    states = torch.randn(2, 2, 64, 64)
    clean = dequantize(*quantize(states, 4, 32, axis), 32, axis)
    states[1, 0, 40, 7] = fault
    poisoned = dequantize(*quantize(states, 4, 32, axis), 32, axis)
    group = torch.zeros_like(states, dtype=torch.bool)
    if axis == "channel":
        group[1, 0, 32:64, 7] = True
    else:
        group[1, 0, 40, 0:32] = True
    assert poisoned[group].isnan().all()
    assert torch.equal(poisoned[~group], clean[~group])


def test_magnitudes_beyond_float16_saturate():
    states = torch.tensor([-1e6, 0.0, 1e6, 1e6]).repeat(1, 1, 1, 8)
    read = dequantize(*quantize(states, 8, 32, "token"), 32, "token")
    assert read.isfinite().all() and read.abs().max() > 60000


def test_encode_takes_the_nearest_code_of_a_given_scale():
    states = states_of(32, 64)
    _, scale, minimum = quantize(states, 2, 32, "channel")
    codes = encode(states, scale, minimum, 2, 32, "channel")
    levels = minimum.float()[..., None] + scale.float()[..., None] * torch.arange(4.0)  # [..., 1, head_dim, 4]
    nearest = (states[..., None] - levels).abs().argmin(-1)
    assert torch.equal(codes.long(), nearest)


@pytest.mark.parametrize("head_dim", [2, 64, 80, 96, 100, 128, 256])
def test_hadamard_is_the_orthonormal_matrix_and_its_own_inverse(head_dim):
    states = torch.randn(2, 3, 5, head_dim)
    rotated = hadamard(states)
    assert torch.allclose(rotated.double(), rotate(states), atol=1e-5)
    assert torch.allclose(hadamard(rotated), states, atol=1e-5)
    one_by_one = torch.cat([hadamard(token) for token in states.split(1, dim=2)], dim=2)
    assert torch.equal(one_by_one, rotated)  # the codes must not depend on how many tokens come at once


def test_hadamard_refuses_an_odd_head_dim():
    assert rotation_block(80) == 16
    with pytest.raises(ValueError, match=r"rotation.*head_dim 33.*even"):
        rotation_block(33)
