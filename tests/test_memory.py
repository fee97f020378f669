import pytest
import torch

from kivicache import KIVICache, KIVIConfig, MemoryReport
from kivicache.buffer import GROWTH, TokenBuffer
from kivicache.layer import KIVILayer
from kivicache.memory import format_bytes
from tests.tiny import prompt, tiny_llama


def buffers_of(thing):
    """Every TokenBuffer held anywhere below ``thing``, found without the library's help."""
    if isinstance(thing, TokenBuffer):
        return [thing]
    if isinstance(thing, (list, tuple)):
        return [buffer for item in thing for buffer in buffers_of(item)]
    return (
        [buffer for item in vars(thing).values() for buffer in buffers_of(item)] if hasattr(thing, "__dict__") else []
    )


CONFIGS = {
    "defaults": KIVIConfig(),
    "paper": KIVIConfig.paper(2),
    "K8V16": KIVIConfig(nbits_key=8, nbits_value=16, sink_length=0),
    "per_token": KIVIConfig(nbits=4, group_size=-1),
    "mixed_heads": KIVIConfig(heads={0: {1: 16}, 1: {0: 8}}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_agrees_with_the_storage_of_the_tensors_held(config):
    model, cache = tiny_llama(), KIVICache(config)
    with torch.no_grad():
        for tokens in (300, 1, 1, 40, 1):
            model(prompt(tokens=tokens)["input_ids"], past_key_values=cache)
    report = cache.memory()
    buffers = [buffer for layer in cache.layers for buffer in buffers_of(layer)]
    assert report.total == sum(buffer.data.untyped_storage().nbytes() for buffer in buffers)
    assert report.values == 2 * 2 * 2 * 2 * 343 * 16  # layers, K and V, batch, kv heads, tokens, head_dim
    assert report.sixteen_bit == 2 * report.values
    assert report.bits_per_value == pytest.approx(8 * report.total / report.values)
    assert sum(report.layers, MemoryReport()).total == report.total and len(report.layers) == 2
    assert all(layer == cache.layers[idx].memory() for idx, layer in enumerate(report.layers))


@pytest.mark.parametrize(("nbits", "cost"), [(2, 3.0), (4, 5.0), (8, 9.0)])
@pytest.mark.parametrize("config", [KIVIConfig, KIVIConfig.paper], ids=["window", "paper"])
def test_a_packed_value_costs_its_bits_and_one_more_in_groups_of_32(config, nbits, cost):
    layer = KIVILayer(config(nbits=nbits).layer(0))
    layer.update(torch.randn(2, 3, 1000, 128, dtype=torch.float16), torch.randn(2, 3, 1000, 64, dtype=torch.float16))
    assert layer.memory().packed_bits_per_value == cost


def test_a_long_cache_costs_little_more_than_its_packed_values():
    layer = KIVILayer(KIVIConfig(nbits=2).layer(0))
    states = torch.randn(1, 1, 8192, 64, dtype=torch.float16)
    layer.update(states, states)
    memory = layer.memory()
    assert memory.slack <= memory.total / GROWTH + 4096
    assert memory.bits_per_value < 3.5
    assert memory.sinks == 2 * 32 * 64 * 2 and memory.residual == 2 * 128 * 64 * 2


def test_layers_that_are_not_packed_are_counted():
    model = tiny_llama()
    cache = KIVICache(KIVIConfig(nbits=16))
    with torch.no_grad():
        model(prompt()["input_ids"], past_key_values=cache)
    memory = cache.memory()
    assert memory.codes == memory.scales == 0 and memory.packed_bits_per_value == 0.0
    assert memory.full_precision + memory.sinks + memory.residual == 4 * memory.values


def test_a_report_says_how_the_cache_compares_with_16_bits():
    assert "(4.00x smaller than 16 bits)" in str(MemoryReport(codes=100, values=200))
    assert "(1.50x larger than 16 bits)" in str(MemoryReport(codes=600, values=200))


def test_an_empty_cache():
    memory = KIVICache().memory()
    assert memory.total == memory.values == 0 and memory.bits_per_value == 0.0
    assert "total" in str(memory) and "empty" in repr(KIVICache())


def test_is_readable():
    cache = KIVICache(KIVIConfig(nbits=4))
    with torch.no_grad():
        tiny_llama()(prompt(tokens=400)["input_ids"], past_key_values=cache)
    assert repr(cache).startswith("KIVICache(2 x K4V4 g32; 400 tokens, ")
    lines = str(cache.memory()).splitlines()
    for label in ("codes", "scales and minima", "sinks", "residual", "slack", "total", "in 16 bits", "bits per value"):
        assert any(line.startswith(label) for line in lines)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.00 GiB")]
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text
