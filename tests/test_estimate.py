"""Estimates against caches and models that really are."""

import json

import pytest
import torch
from transformers import DeepseekV3Config, DynamicCache, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from kivicache import KIVICache, KIVIConfig
from kivicache.__main__ import main
from kivicache.estimate import cache_bytes, estimate, weight_bytes
from kivicache.memory import held_by

LLAMA = LlamaConfig(
    vocab_size=90, hidden_size=96, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=32, dtype="bfloat16", tie_word_embeddings=True,
)  # fmt: skip
SLIDING = Gemma3TextConfig(
    vocab_size=90, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=40, dtype="float32",
)  # fmt: skip
CONFIGS = {
    "default": KIVIConfig(),
    "2_bits": KIVIConfig(nbits=2, residual_length=64, sink_length=5),
    "per_token": KIVIConfig(nbits=4, group_size=-1),
    "by_layer": KIVIConfig(nbits=2, layers={1: {"nbits": 16}, 3: {"nbits_key": 16, "rotation": "hadamard"}}),
}


def measured(model, cfg, context, batch, fixed):
    """What a cache holds after a prompt and one step."""
    cfg = cfg if model is SLIDING else KIVIConfig.from_dict({**cfg.to_dict(), "layers": {1: cfg.layers.get(1, {})}})
    cache = KIVICache(cfg, config=model, max_cache_len=context if fixed else None)
    for tokens in (context - 1, 1):
        for layer_idx in range(len(cache.layers)):
            states = torch.randn(batch, 2, tokens, 32, dtype=model.dtype)
            cache.update(states, states, layer_idx)
    return cfg, cache.memory().total


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@pytest.mark.parametrize("model", [LLAMA, SLIDING], ids=["llama", "sliding"])
@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_agrees_with_what_a_cache_holds(cfg, model, fixed):
    context, batch = int(torch.randint(600, 3000, ())), 2
    cfg, held = measured(model, cfg, context, batch, fixed)
    assert estimate(model, cfg, context=context, batch=batch, fixed=fixed).cache == pytest.approx(held, rel=0.01)


def test_sixteen_bits_are_a_dynamic_cache():
    cache, states = DynamicCache(config=LLAMA), torch.zeros(1, 2, 777, 32, dtype=torch.bfloat16)
    for layer_idx in range(3):
        cache.update(states, states, layer_idx)
    assert cache_bytes(LLAMA, None, 777) == sum(held_by(layer).total for layer in cache.layers)


def test_weights_are_those_of_the_model():
    model = LlamaForCausalLM(LLAMA).to(torch.bfloat16)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    assert weight_bytes(LLAMA) == pytest.approx(sum(held.values()), abs=4096)  # rotary tables may stay in float32


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_the_largest_that_fits_fits_and_no_larger(fixed):
    memory = weight_bytes(LLAMA) + 30_000_000
    found = estimate(LLAMA, KIVIConfig(nbits=2), context=1000, batch=3, gpu_memory=memory, fixed=fixed)
    one = estimate(LLAMA, KIVIConfig(nbits=2), context=1000, fixed=fixed)
    assert found.largest_batch * one.cache <= 30_000_000 < (found.largest_batch + 1) * one.cache
    for extra, fits in ((0, True), (64, False)):  # blocks of 32: a token more may cost nothing
        context = found.largest_context + extra
        assert (
            estimate(LLAMA, KIVIConfig(nbits=2), context=context, batch=3, fixed=fixed).cache <= 30_000_000
        ) == fits
    assert found.largest_context > 3 * found.largest_context_sixteen_bit > 0
    none = estimate(LLAMA, context=10, gpu_memory=1000)
    assert none.largest_batch == none.largest_context == none.largest_context_sixteen_bit == 0


def test_command_line_on_a_local_config(tmp_path, capsys):
    LLAMA.save_pretrained(tmp_path)
    for model in (tmp_path, tmp_path / "config.json"):
        arguments = ["estimate", "--model", str(model), "--context", "5000", "--batch", "2", "--nbits", "2"]
        assert main([*arguments, "--gpu-memory", "1", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        expected = estimate(LLAMA, KIVIConfig(nbits=2), context=5000, batch=2, gpu_memory=2**30)
        assert found == vars(expected)
        assert main(arguments) == 0
        assert "KIVICache, 2 x 5,000 tokens" in capsys.readouterr().out


def test_what_cannot_be_estimated_says_so(tmp_path, capsys):
    with pytest.raises(ValueError, match="latents"):
        estimate(DeepseekV3Config(num_hidden_layers=1), context=10)
    assert main(["estimate", "--model", str(tmp_path / "none"), "--context", "10"]) == 2
    assert "cannot be found" in capsys.readouterr().err
    for arguments in (["--context", "0"], ["--context", "9", "--gpu-memory", "no"]):
        with pytest.raises(SystemExit):
            main(["estimate", "--model", "x", *arguments])
