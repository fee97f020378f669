"""The grammar of cache settings, and what the caches weigh."""

import pytest
import torch
from transformers import DynamicCache, QuantizedCache

from kivicache import KIVICache, KIVIConfig
from kivicache.caches import CacheSpec, cache_bits, split_options
from kivicache.fidelity import cache_argument
from tests.architectures import tiny_model
from tests.tiny import tiny_llama


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("kivi", KIVIConfig()),
        ("kivi:2", KIVIConfig(nbits=2)),
        (
            "kivi:k8v4:g64:r32:s4",
            KIVIConfig(nbits_key=8, nbits_value=4, group_size=64, residual_length=32, sink_length=4),
        ),
        ("kivi:g-1:hadamard", KIVIConfig(group_size=-1, rotation="hadamard")),
        ("kivi:2:quanto", KIVIConfig(nbits=2, backend="quanto")),
        ("kivi:nbits=2,rotation=hadamard", KIVIConfig(nbits=2, rotation="hadamard")),
        ("kivi:4:rotation=null,axis_key=token", KIVIConfig(nbits=4, axis_key="token")),
        ("kivi:2.5bit", KIVIConfig.preset("2.5bit")),
        ("kivi:4bit:r64:rotation=null", KIVIConfig(residual_length=64)),
        ("kivi:g64:4bit", KIVIConfig(group_size=64, rotation="hadamard")),
        ("kivi:4bit:k2v2", KIVIConfig.preset("3bit")),
        ("paper:2", KIVIConfig.paper(2)),
        ("paper:k4v2:g64", KIVIConfig(nbits_key=4, nbits_value=2, group_size=64, sink_length=0, policy="paper")),
    ],
)
def test_a_setting_is_its_config(text, config):
    spec = CacheSpec.parse(text)
    assert (spec.name, spec.kind, KIVIConfig.from_dict(spec.settings)) == (text, "kivi", config)
    cache = spec.new(tiny_llama().config)
    assert isinstance(cache, KIVICache) and cache.kivi_config == config


def test_files_and_the_caches_of_transformers(tmp_path):
    config, model_config = KIVIConfig(layers={1: {"nbits": 8}}), tiny_llama().config
    config.to_yaml(tmp_path / "mine.yaml")
    spec = CacheSpec.parse(str(tmp_path / "mine.yaml"))
    assert spec.name == str(tmp_path / "mine.yaml") and spec.new(model_config).kivi_config == config
    assert type(CacheSpec.parse("dynamic").new(model_config)) is DynamicCache
    layer = CacheSpec.parse("hf-hqq:2:g32:r64:a1/0").new(model_config).layers[0]
    assert (layer.nbits, layer.q_group_size, layer.residual_length, layer.axis_key, layer.axis_value) == (
        2,
        32,
        64,
        1,
        0,
    )
    defaults = QuantizedCache("quanto", model_config).layers[0]
    layer = CacheSpec.parse("hf-quanto").new(model_config).layers[0]
    assert (layer.nbits, layer.q_group_size) == (defaults.nbits, defaults.q_group_size)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("static", "cache: got 'static'; allowed: dynamic, kivi"),
        ("dynamic:4", "cache: got 'dynamic:4'"),
        ("hf-fp8:8", "cache: got 'hf-fp8:8'"),
        ("kivi:3", r"cache 'kivi:3': nbits: got 3; allowed: 2, 4, 8, 16"),
        ("kivi:fast", r"unknown option 'fast'; allowed: .*, 3bit, .*hadamard, native"),
        ("kivi:3bit:4", "nbits: got 4 beside nbits_key=2"),
        ("kivi:depth=2", "depth: unknown setting"),
        ("kivi:nbits=2,nbits=4", "nbits: given twice; allowed: once"),
        ("kivi:2:4", "cache 'kivi:2:4': nbits: given twice; allowed: once"),
        ("kivi:2:nbits=4", "nbits: given twice"),
        ("kivi:k4v2:nbits_key=2", "nbits_key: given twice"),
        ("kivi:g64:g32", "group_size: given twice"),
        ("kivi:2:hqq:mse", "backend: given twice"),
        ("kivi:hadamard:rotation=null", "rotation: given twice"),
        ("kivi:3bit:5bit", "preset: given twice"),
        ("paper:2:4", "nbits: given twice"),
        ("hf-quanto:4:2", "nbits: given twice"),
        ("hf-hqq:4:g32:q_group_size=64", "q_group_size: given twice"),
        ("hf-quanto:sinks=2", "sinks: unknown option; allowed: nbits"),
        ("kivi:nbits={", "cache 'kivi:nbits={': nbits: got '{'; allowed: a YAML value"),
        ("hf-hqq:residual_length=x", "residual_length: got 'x'; allowed: a whole number"),
        ("hf-quanto:s4", "keeps no sinks"),
        ("no-such.yaml", "cache 'no-such.yaml': No such file"),
    ],
)
def test_what_cannot_be_read_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        CacheSpec.parse(text)


def test_what_transformers_refuses_names_the_setting():
    with pytest.raises(ValueError, match="cache 'hf-quanto:8'"):
        CacheSpec.parse("hf-quanto:8").new(tiny_llama().config)


def test_options_are_split_outside_of_lists():
    assert split_options("a:b,c=[1,2]:d=x") == ("a", ["b"], {"c": [1, 2], "d": "x"})


@pytest.mark.parametrize(
    ("text", "packed", "exact_tokens"),
    [
        ("dynamic", 16, 300),
        ("kivi:16", 16, 300),
        ("kivi:2:s4", 3, 4 + 136),
        ("kivi:8:g16", 10, 32 + 140),
        ("paper:4", 5, 128 / 2 + 44 / 2),
        ("hf-quanto:4:g32", 5, 0),
        ("hf-hqq:2:g32", 3, 0),
        ("hf-fp8", 8, 0),
    ],
)
def test_bits_are_what_the_format_says(text, packed, exact_tokens):
    """A prompt of 300 tokens and 20 more: counts by hand, whatever dtype the states have."""
    tokens = 320 if "hf" in text else 300
    cache = CacheSpec.parse(text).new(tiny_llama(head_dim=64).config)
    for layer_idx in range(2):
        states = torch.randn(1, 2, tokens, 64)
        cache.update(states, states, layer_idx)
    bits = cache_bits(cache)
    assert bits.per_packed_value == pytest.approx(packed, rel=1e-3)
    assert bits.per_value == pytest.approx((packed * (tokens - exact_tokens) + 16 * exact_tokens) / tokens, rel=1e-3)


def test_room_for_more_tokens_does_not_weigh():
    config = KIVIConfig(nbits=4, layers={0: {"nbits": 16}})
    cache = KIVICache(config, config=tiny_llama(head_dim=64).config, max_cache_len=900)
    for layer_idx in range(2):
        states = torch.randn(1, 2, 320, 64)
        cache.update(states, states, layer_idx)
    exact, packed = cache.memory().layers
    values = 2 * 2 * 320 * 64
    assert (exact.values, exact.full_precision, packed.values) == (values, 4 * values, values)
    assert exact.total == 4 * 2 * 2 * 900 * 64
    # half of the second layer's tokens are 32 sinks and a residual of 128
    assert cache_bits(cache).per_value == pytest.approx((16 + (16 + 5) / 2) / 2)


def test_layers_without_keys_weigh_their_states():
    model = tiny_model("qwen3_next")
    cache = CacheSpec.parse("kivi:8:g8:r8:s4").new(model.config)
    with torch.no_grad():
        model(torch.randint(3, 90, (1, 48)), **{cache_argument(model): cache})
    assert 8 < cache_bits(cache).per_value < 16 and cache_bits(cache).per_packed_value == 12


def test_tokens_behind_a_quantized_prompt_are_exact():
    cache = CacheSpec.parse("hf-quanto:4:g32").new(tiny_llama(head_dim=64).config)
    for tokens in (320, 20):
        for layer_idx in range(2):
            states = torch.randn(1, 2, tokens, 64)
            cache.update(states, states, layer_idx)
    assert cache_bits(cache).per_value == pytest.approx((5 * 320 + 16 * 20) / 340)
