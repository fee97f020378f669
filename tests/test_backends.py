"""Every backend through one matrix: shapes, its own library's reading, the size of its error, faults, generation."""

from __future__ import annotations

import copy
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kivicache import KIVICache, KIVIConfig
from kivicache.backends import Backend, LibraryBackend, available_backends, get_backend, mse, native
from kivicache.quantization import dequantize

LIBRARIES = {"native": "torch", "mse": "torch", "hqq": "hqq.core.quantize", "quanto": "optimum.quanto"}
ALL_NBITS = (2, 4, 8)
# head_dim and group_size; 80 and 100 leave a ragged last group, -1 is one group per token
SHAPES = ((64, 32), (80, 64), (100, 32), (100, -1))
CASES = [
    pytest.param(head_dim, group_size, axis, id=f"{head_dim}-g{group_size}-{axis}")
    for head_dim, group_size in SHAPES
    for axis in ("channel", "token")
    if (group_size, axis) != (-1, "channel")
]


@pytest.fixture(params=sorted(LIBRARIES))
def name(request: pytest.FixtureRequest) -> str:
    """The name of a backend whose library is installed."""
    pytest.importorskip(LIBRARIES[request.param], reason=f"backend {request.param!r} is not installed")
    return str(request.param)


@pytest.fixture
def backend(name: str) -> Backend:
    return get_backend(name)


def random_states(head_dim: int = 64, tokens: int = 64) -> Tensor:
    """``[2, 3, tokens, head_dim]``, every 16th channel wide and off zero, as in the keys of real models."""
    states = torch.randn(2, 3, tokens, head_dim)
    states[..., ::16] = 4 * states[..., ::16] + 8
    return states


def read_back(backend: Backend, states: Tensor, nbits: int, group_size: int, axis: str) -> Tensor:
    group_size = states.shape[3] if group_size == -1 else group_size
    return dequantize(*backend.quantize(states, nbits, group_size, axis), group_size, axis)


def relative_error(states: Tensor, exact: Tensor) -> float:
    return float((states - exact).norm() / exact.norm())


def by_library(name: str, states: Tensor, nbits: int, group_size: int, axis: str) -> Tensor:
    """``states`` quantized and dequantized by the library alone, in float32 throughout."""
    head_dim = states.shape[3]
    group_size = head_dim if group_size == -1 else group_size
    if axis == "channel":
        rows = states.unflatten(2, (-1, group_size)).transpose(3, 4)
        return _rows_by_library(name, rows, nbits).transpose(3, 4).flatten(2, 3)
    groups = states.split(group_size, dim=3)  # the last one may be shorter
    return torch.cat([_rows_by_library(name, group, nbits) for group in groups], dim=3)


def _rows_by_library(name: str, groups: Tensor, nbits: int) -> Tensor:
    rows = groups.reshape(-1, groups.shape[-1])
    read = {
        "native": _rows_by_reference,
        "mse": _rows_by_trying_ranges,
        "hqq": _rows_by_hqq,
        "quanto": _rows_by_quanto,
    }[name]
    return read(rows, nbits).reshape(groups.shape)


def _rows_by_reference(rows: Tensor, nbits: int) -> Tensor:
    minimum = rows.amin(1, keepdim=True)
    scale = (rows.amax(1, keepdim=True) - minimum) / (2**nbits - 1)
    return torch.round((rows - minimum) / scale) * scale + minimum


def _rows_by_trying_ranges(rows: Tensor, nbits: int) -> Tensor:
    """The backend's own rule written out group by group: the best of min-max and of fits from narrowed ranges."""
    return torch.stack([_best_range(row, nbits) for row in rows.double()]).float()


def _best_range(row: Tensor, nbits: int) -> Tensor:
    levels, width = 2**nbits - 1, row.max() - row.min()
    tried = [((row - row.min()) / width * levels).round() / levels * width + row.min()]
    for narrowing in (0.0, 0.15, 0.3):
        minimum, scale = row.min() + narrowing / 2 * width, (1 - narrowing) * width / levels
        for _ in range(mse.ROUNDS):
            codes = ((row - minimum) / scale).round().clamp(0, levels)
            design = torch.stack([codes, torch.ones_like(codes)], dim=1)
            scale, minimum = torch.linalg.lstsq(design, row[:, None]).solution[:, 0]
        tried.append(((row - minimum) / scale).round().clamp(0, levels) * scale + minimum)
    return min(tried, key=lambda read: float((read - row).square().sum()))


def _rows_by_hqq(rows: Tensor, nbits: int) -> Tensor:
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        rows, nbits=nbits, group_size=rows.shape[1], axis=1, device="cpu", compute_dtype=torch.float32
    )
    read: Tensor = Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    return read


def _rows_by_quanto(rows: Tensor, nbits: int) -> Tensor:
    from optimum.quanto import MaxOptimizer, qtypes
    from optimum.quanto.tensor.qbits import QBitsDequantizer

    qtype = qtypes[f"qint{nbits}"]
    scale, shift = MaxOptimizer()(rows, qtype, axis=0)
    codes = torch.ops.quanto.quantize_affine(rows, bits=nbits, axis=0, group_size=None, scale=scale, shift=shift)
    # quanto's own dequantizer, handed the codes as they are: its packed tensors would compile a C++ extension first
    fields = {"_data": codes, "_scale": scale, "_shift": shift, "qtype": qtype, "axis": 0, "shape": rows.shape}
    read: Tensor = QBitsDequantizer.forward(None, SimpleNamespace(**fields))
    return read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "group_size", "axis"), CASES)
@pytest.mark.parametrize("nbits", ALL_NBITS)
def test_shapes_and_dtypes_are_those_of_the_native_backend(
    backend: Backend, nbits: int, head_dim: int, group_size: int, axis: str, dtype: torch.dtype
) -> None:
    states = random_states(head_dim).to(dtype)
    group_size = head_dim if group_size == -1 else group_size
    expected = native.NativeBackend().quantize(states, nbits, group_size, axis)
    result = backend.quantize(states, nbits, group_size, axis)
    for tensor, like in zip(result, expected, strict=True):
        assert (tensor.shape, tensor.dtype, tensor.device) == (like.shape, like.dtype, like.device)
    assert int(result[0].max()) == 2**nbits - 1


@pytest.mark.parametrize(("head_dim", "group_size", "axis"), CASES)
@pytest.mark.parametrize("nbits", ALL_NBITS)
def test_reads_back_as_the_library_itself_does(
    name: str, backend: Backend, nbits: int, head_dim: int, group_size: int, axis: str
) -> None:
    states = random_states(head_dim)
    expected = by_library(name, states, nbits, group_size, axis)
    result = read_back(backend, states, nbits, group_size, axis)
    # float16's rounding of scale and minimum moves a value by this at the most, but for the few values midway between
    # two codes, which may then fall to the other side.
    rounding = 2**-10 * states.abs().max()
    assert ((result - expected).abs() > rounding).float().mean() < 0.02
    assert relative_error(result, states) < 1.03 * relative_error(expected, states)


@pytest.mark.parametrize(("head_dim", "group_size", "axis"), CASES)
def test_more_bits_are_better_and_no_library_much_worse_than_min_max(
    backend: Backend, head_dim: int, group_size: int, axis: str
) -> None:
    states = random_states(head_dim)
    errors, min_max = (
        [relative_error(read_back(by, states, nbits, group_size, axis), states) for nbits in ALL_NBITS]
        for by in (backend, native.NativeBackend())
    )
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert all(error < 1.05 * bound for error, bound in zip(errors, min_max, strict=True))


@pytest.mark.parametrize(("head_dim", "group_size", "axis"), CASES)
def test_hqq_has_less_error_than_min_max_in_its_own_norm(head_dim: int, group_size: int, axis: str) -> None:
    pytest.importorskip(LIBRARIES["hqq"], reason="backend 'hqq' is not installed")
    states = random_states(head_dim)
    hqq, min_max = (
        (read_back(get_backend(name), states, 2, group_size, axis) - states).abs().pow(0.7).mean()
        for name in ("hqq", "native")
    )
    assert hqq < min_max


@pytest.mark.parametrize(("head_dim", "group_size", "axis"), CASES)
def test_mse_has_much_less_squared_error_than_min_max(head_dim: int, group_size: int, axis: str) -> None:
    states = random_states(head_dim)
    fitted, min_max = (read_back(get_backend(name), states, 2, group_size, axis) for name in ("mse", "native"))
    assert (fitted - states).square().mean() < 0.8 * (min_max - states).square().mean()
    by_group = [
        group(read - states, group_size, axis).square().mean(-1) for read in (fitted, min_max)
    ]  # no group is worse, but for the rounding of its scale and minimum
    assert (by_group[0] <= 1.02 * by_group[1] + 1e-6).all()


def group(states: Tensor, group_size: int, axis: str) -> Tensor:
    group_size = states.shape[3] if group_size == -1 else group_size
    if axis == "channel":
        return states.unflatten(2, (-1, group_size)).transpose(3, 4)
    whole = states.shape[3] - states.shape[3] % group_size
    return states[..., :whole].unflatten(3, (-1, group_size))


@pytest.mark.parametrize("nbits", ALL_NBITS)
def test_quanto_is_min_max_to_the_bit(nbits: int) -> None:
    pytest.importorskip(LIBRARIES["quanto"], reason="backend 'quanto' is not installed")
    states = random_states()
    results = [get_backend(name).quantize(states, nbits, 32, "token") for name in ("native", "quanto")]
    for tensor, other in zip(*results, strict=True):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_a_narrow_group_far_from_zero_keeps_its_bits(backend: Backend, axis: str) -> None:
    """float16 holds a minimum of 100 to 1/32 only, a whole 8-bit step here: the codes must make up for it."""
    states = 100 + 2 * torch.randn(2, 3, 64, 64)
    error = (read_back(backend, states, 8, 32, axis) - states).abs().mean()
    groups = states.unflatten(3, (-1, 32))
    step = (groups.amax(4) - groups.amin(4)).mean() / 255
    assert error < 0.35 * step  # a quarter of a step is what rounding to the nearest code costs


def test_a_ragged_last_group_is_as_exact_as_the_others(backend: Backend) -> None:
    states = torch.randn(2, 3, 64, 100)  # the last group of 32 holds four channels
    error = (read_back(backend, states, 2, 32, "token") - states).abs().mean(dim=(0, 1, 2))
    assert error[96:].mean() < 1.05 * error[:96].mean()


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("nbits", ALL_NBITS)
@pytest.mark.parametrize("constant", [0.0, 0.5, -3.0, 1000.0, 1e-6])
def test_constant_groups_read_back_as_their_constant(backend: Backend, constant: float, nbits: int, axis: str) -> None:
    states = random_states()
    constant = float(torch.tensor(constant).half())
    group = (0, 1, slice(0, 32), 5) if axis == "channel" else (0, 1, 5, slice(0, 32))
    states[group] = constant
    result = read_back(backend, states, nbits, 32, axis)
    assert (result[group] == constant).all()
    assert relative_error(result, states) < 1


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_a_fault_stays_in_its_group(backend: Backend, fault: float, axis: str) -> None:
    states = random_states()
    group = (1, 2, slice(32, 64), 7) if axis == "channel" else (1, 2, 40, slice(0, 32))
    zeros, faulty = states.clone(), states.clone()
    zeros[group] = 0.0  # hqq stops all groups by their mean error, to which such a group adds nothing
    faulty[1, 2, 40, 7] = fault
    result, expected = (read_back(backend, x, 4, 32, axis) for x in (faulty, zeros))
    assert result[group].isnan().all()
    result[group] = 0.0
    assert torch.equal(result, expected)


@pytest.mark.parametrize("magnitude", [1e-3, 6e4, 1e7])
def test_extreme_magnitudes_stay_finite(backend: Backend, magnitude: float) -> None:
    states = magnitude * torch.randn(1, 1, 32, 64)
    for axis in ("channel", "token"):
        result = read_back(backend, states, 4, 32, axis)
        assert result.isfinite().all()
        if magnitude < 1:
            assert relative_error(result, states) < 0.15


def test_a_single_group_and_no_token_at_all(backend: Backend) -> None:
    """One group is one row, which quanto's optimizer would take for a tensor without groups."""
    states = torch.randn(1, 1, 1, 64)
    codes, scale, minimum = backend.quantize(states, 8, 64, "token")
    assert scale.shape == minimum.shape == (1, 1, 1, 1)
    assert relative_error(dequantize(codes, scale, minimum, 64, "token"), states) < 0.02
    for axis in ("channel", "token"):
        assert [x.shape[2] for x in backend.quantize(states[:, :, :0], 4, 32, axis)] == [0, 0, 0]


def test_results_are_ordinary_tensors_without_gradients(backend: Backend) -> None:
    states = random_states().requires_grad_()
    for tensor in backend.quantize(states, 4, 32, "token")[1:]:
        assert not tensor.is_inference()
        assert isinstance(backend, native.NativeBackend) or not tensor.requires_grad


def test_a_backend_can_be_copied_with_its_cache(backend: Backend) -> None:
    states = random_states()
    expected = backend.quantize(states, 4, 32, "token")
    for tensor, other in zip(copy.deepcopy(backend).quantize(states, 4, 32, "token"), expected, strict=True):
        assert torch.equal(tensor, other)


@pytest.fixture(scope="module")
def model() -> Any:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=20,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("nbits", ALL_NBITS)
def test_a_model_reads_from_the_cache_what_the_library_dequantizes(name: str, nbits: int, model: Any) -> None:
    settings = KIVIConfig(backend=name, nbits=nbits, group_size=16, residual_length=16, sink_length=4)
    prompt = torch.randint(64, (2, 57))
    cache, exact = KIVICache(settings, config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=exact)
        model(prompt, past_key_values=cache)
    packed = slice(4, 4 + 32)  # 57 = 4 sinks, two blocks of 16, and at least 16 exact ones
    for layer, exact_layer in zip(cache.layers, exact.layers, strict=True):
        for side, axis in (("keys", "channel"), ("values", "token")):
            states, expected = getattr(layer, side), getattr(exact_layer, side).clone()
            expected[:, :, packed] = by_library(name, expected[:, :, packed], nbits, 16, axis)
            rounding = 2**-10 * expected.abs().max()
            # of 8 bits, 1.5 % of the values are next to another code for a scale that is not float16's: 2.2 % at most
            assert ((states - expected).abs() > rounding).float().mean() < 0.04
            states[:, :, packed] = expected[:, :, packed] = 0
            assert torch.equal(states, expected)


def test_generates(name: str, model: Any) -> None:
    settings = KIVIConfig(backend=name, group_size=16, residual_length=16, sink_length=4)
    cache = KIVICache(settings, config=model.config)
    tokens = model.generate(torch.randint(64, (2, 40)), past_key_values=cache, max_new_tokens=24, do_sample=False)
    assert tokens.shape == (2, 64)
    assert cache.get_seq_length() == 63
    assert cache.memory().packed_values == 2 * 2 * 2 * 3 * 32 * 20  # sides, layers, batch, heads, tokens, head_dim


def test_lists_the_backends_whatever_is_installed() -> None:
    assert available_backends() == sorted(LIBRARIES)


def test_refuses_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend: got 'int3'; allowed: 'hqq', 'mse', 'native', 'quanto'"):
        get_backend("int3")


def test_refuses_a_second_backend_of_one_name() -> None:
    with pytest.raises(ValueError, match=r"backend 'native' is already registered, by NativeBackend"):
        type("Second", (native.NativeBackend,), {}, name="native")
    assert isinstance(get_backend("native"), native.NativeBackend)


def test_a_base_for_other_backends_is_not_listed() -> None:
    type("MyLibrary", (LibraryBackend,), {})
    assert available_backends() == sorted(LIBRARIES)


@pytest.mark.parametrize("name", ["hqq", "quanto"])
def test_a_missing_library_names_the_command_that_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)
    with pytest.raises(ImportError, match=rf'pip install "kivicache\[{name}\]"'):
        get_backend(name)


@pytest.mark.parametrize(("name", "part"), [("hqq", "Quantizer"), ("quanto", "MaxOptimizer")])
def test_another_version_of_a_library_is_said(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LIBRARIES[name], SimpleNamespace())
    with pytest.raises(ImportError, match=rf'has no {part}\).*pip install "kivicache\[{name}\]"'):
        get_backend(name)


def test_imports_no_library_before_it_is_asked_for() -> None:
    """transformers itself imports hqq where it is installed, so the libraries are made unimportable instead."""
    program = (
        "import sys; sys.modules.update({'hqq': None, 'optimum': None})\n"
        "from kivicache.backends import available_backends\n"
        "print(*available_backends())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == sorted(LIBRARIES)
