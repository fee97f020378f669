"""The cache of fixed capacity against the growing one: same tokens, same bytes, compiled or not."""

import warnings

import pytest
import torch
from transformers import CompileConfig

from kivicache import KIVICache, KIVIConfig
from kivicache.fixed import FixedKIVILayer
from kivicache.layer import KIVILayer
from tests.tiny import prompt, tiny_llama

SMALL = {"group_size": 8, "residual_length": 16, "sink_length": 3}
CONFIGS = {
    "2_bits": KIVIConfig(nbits=2, **SMALL),
    "8_4_bits": KIVIConfig(nbits_key=8, nbits_value=4, **SMALL),
    "rotated": KIVIConfig(nbits=4, rotation="hadamard", **SMALL),
    "per_token": KIVIConfig(nbits=4, group_size=-1, residual_length=16, sink_length=0),
    "one_side": KIVIConfig(nbits_key=16, nbits_value=2, **SMALL),
    "16_bits": KIVIConfig(nbits=16, **SMALL),
}
PACKED = {name: config for name, config in CONFIGS.items() if name != "16_bits"}
CAPACITY = 160


def fixed_cache(config, max_cache_len=CAPACITY, model=None):
    return KIVICache(config, config=(model or tiny_llama()).config, max_cache_len=max_cache_len)


def compiled(backend="aot_eager", **kwargs):
    """What makes ``generate`` compile on the CPU as it does on a GPU, where a graph break is an error."""
    config = CompileConfig(fullgraph=True, mode=None, backend=backend, **kwargs)
    config._compile_all_devices = True
    return config


def generate(model, inputs, cache, **kwargs):
    torch.manual_seed(1234)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return model.generate(**inputs, past_key_values=cache, **{"max_new_tokens": 40, "do_sample": False, **kwargs})


@pytest.fixture
def no_recompilation():
    """After the first step, nothing may be compiled again."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    yield graphs
    torch._dynamo.reset()


def assert_same_content(fixed, growing):
    for layer, expected in zip(fixed.layers, growing.layers, strict=True):
        assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)


@pytest.mark.parametrize("config", PACKED.values(), ids=PACKED)
def test_a_layer_holds_what_a_growing_one_holds(config):
    """Bit by bit, whatever comes in what pieces: prompt, steps, drafts, chunks, and crops into the packed part."""
    growing, fixed = KIVILayer(config.layer(0)), FixedKIVILayer(config.layer(0), 400)
    generator = torch.Generator().manual_seed(torch.initial_seed())
    new = [50, *[1] * 20, 5, 16, 17, 3, -2, 1, 60, -45, *[1] * 30, -30, 4, 16, 16, 16, *[2] * 20]
    for step, tokens in enumerate(new):
        if tokens < 0:
            growing.crop(tokens)
            fixed.crop(tokens)
        else:
            states = torch.randn(2, 2, 3, tokens, 16, generator=generator)
            length = growing.get_seq_length() + tokens
            expected, seen = growing.update(*states), fixed.update(*states)
            assert fixed.get_seq_length() == length
            for dense, expected_dense in zip(seen, expected, strict=True):
                assert torch.equal(dense[:, :, :length], expected_dense), (step, tokens)
                assert step == 0 or (dense.shape[2] == 400 and not dense[:, :, length:].any())
        if step % 7 == 3:
            assert torch.equal(fixed.keys, growing.keys) and torch.equal(fixed.values, growing.values), (step, tokens)
    report, expected_report = fixed.memory(), growing.memory()
    assert (report.codes, report.scales, report.values) == (
        expected_report.codes,
        expected_report.scales,
        expected_report.values,
    )


@pytest.mark.parametrize("padding", [0, 9], ids=["", "left_padded"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_compiled_generation_is_the_growing_cache_s(config, padding, no_recompilation):
    model, inputs = tiny_llama(), prompt(padding=padding)
    growing, fixed = KIVICache(config), fixed_cache(config)
    expected = generate(model, inputs, growing)
    assert torch.equal(generate(model, inputs, fixed, compile_config=compiled()), expected)
    assert no_recompilation() == 1
    for layer, other in zip(fixed.layers, growing.layers, strict=True):
        keys = layer.keys[:, :, : other.get_seq_length()]
        assert torch.allclose(keys, other.keys, atol=0.2) and (keys == other.keys).float().mean() > 0.5
