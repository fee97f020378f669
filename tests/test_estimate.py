"""Estimates against caches and models that really are."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import (
    BitsAndBytesConfig,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    ViTConfig,
)

from kivicache import KIVICache, KIVIConfig
from kivicache.__main__ import main
from kivicache.estimate import estimate
from kivicache.fidelity import cache_argument
from kivicache.memory import held_by
from tests.architectures import DECODERS, tiny_model

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


# what they do depends on the numbers, of which there are none (GPT-2 looks for its padding, where it has any)
UNSEEN = ["biogpt", "dbrx", "gpt2", "jetmoe", "longcat_flash"]
SMALL = KIVIConfig(nbits=2, group_size=8, residual_length=8, sink_length=2)


@pytest.mark.parametrize("name", DECODERS)
def test_every_architecture_is_estimated_exactly_or_refused(name):
    model, context = tiny_model(name), 48
    config = type(model.config).from_dict(model.config.to_dict() | {"dtype": "float32"})
    full, packed = DynamicCache(config=model.config), KIVICache(SMALL, config=model.config)
    for cache in (full, packed):
        for ids in torch.randint(3, 90, (1, context)).split([context - 1, 1], dim=1):
            with torch.no_grad():
                model(ids, **{cache_argument(model): cache})
    try:
        found = estimate(config, SMALL, context=context)
    except ValueError as error:
        plain = {type(layer).__name__ for layer in full.layers} <= {"DynamicLayer", "DynamicSlidingWindowLayer"}
        assert not plain or name in UNSEEN, error
    else:
        assert found.full_precision == sum(held_by(layer).total for layer in full.layers)
        assert found.cache == pytest.approx(packed.memory().total, rel=0.01)


def test_weights_are_those_of_the_model():
    model = LlamaForCausalLM(LLAMA).to(torch.bfloat16)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    assert estimate(LLAMA, context=1).weights == pytest.approx(
        sum(held.values()), abs=4096
    )  # rotary tables may stay in float32


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_the_largest_that_fits_fits_and_no_larger(fixed):
    memory = estimate(LLAMA, context=1).weights + 30_000_000
    found = estimate(LLAMA, KIVIConfig(nbits=2), context=1000, batch=3, gpu_memory=memory, fixed=fixed)
    one = estimate(LLAMA, KIVIConfig(nbits=2), context=1000, fixed=fixed)
    assert found.largest_batch * one.cache <= 30_000_000 < (found.largest_batch + 1) * one.cache
    for extra, fits in ((0, True), (1, False)):
        context = found.largest_context + extra
        assert (
            estimate(LLAMA, KIVIConfig(nbits=2), context=context, batch=3, fixed=fixed).cache <= 30_000_000
        ) == fits
    assert found.largest_context > 3 * found.largest_context_full_precision > 0
    none = estimate(LLAMA, context=10, gpu_memory=1000)
    assert none.largest_batch == none.largest_context == none.largest_context_full_precision == 0


@pytest.mark.parametrize(
    "settings",
    [{}, {"policy": "paper", "sink_length": 0}, {"layers": {0: {"group_size": 16}}}],
    ids=["window", "paper", "by_layer"],
)
def test_every_context_up_to_the_longest_fits(settings):
    """A cache is smaller behind a block that it packs: longer contexts may fit where shorter ones do not."""
    cfg = KIVIConfig(**{"nbits": 2, "group_size": 8, "residual_length": 16, "sink_length": 4} | settings)
    weights = estimate(LLAMA, context=1).weights
    sizes = [estimate(LLAMA, cfg, context=context).cache for context in range(1, 100)]
    rooms = [size - 1 for size, after in pairwise(sizes) if after < size]
    assert rooms
    for room in rooms[-3:]:
        found = estimate(LLAMA, cfg, context=1, gpu_memory=weights + room).largest_context
        assert found == next(i for i, size in enumerate(sizes) if size > room)


def test_the_longest_context_of_a_residual_that_never_ends():
    found = estimate(LLAMA, KIVIConfig(residual_length=2**40), context=1, gpu_memory=2**45)  # 10**10 tokens and more
    assert 0.9 < found.largest_context / found.largest_context_full_precision < 1


@pytest.mark.parametrize(
    ("method", "quantization"),
    [
        ("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 128}),
        ("bitsandbytes", {"load_in_4bit": True}),
        ("bitsandbytes", BitsAndBytesConfig(load_in_8bit=True)),
        (None, None),
    ],
)
def test_weights_that_are_stored_quantized_are_said_to_be(method, quantization):
    config = LlamaConfig.from_dict(LLAMA.to_dict())
    if quantization is not None:
        config.quantization_config = quantization
    found = estimate(config, context=100, gpu_memory=2**30)
    plain = estimate(LLAMA, context=100, gpu_memory=2**30)
    assert found.quantization == method and replace(found, quantization=None) == plain
    (label, text), *rows = found.rows()
    if method is None:
        assert label == "weights" and found.rows() == plain.rows()
    else:
        assert label == "weights, unquantized" and text.endswith(f"({method} takes less)")
        assert [text.startswith("at least ") for _, text in rows] == [False] * 2 + [True] * 4


def test_command_line_on_a_local_config(tmp_path, capsys):
    LLAMA.save_pretrained(tmp_path)
    for model in (tmp_path, tmp_path / "config.json"):
        arguments = ["estimate", "--model", str(model), "--context", "5000", "--batch", "2", "--nbits", "2"]
        assert main([*arguments, "--gpu-memory", "1", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        expected = estimate(LLAMA, KIVIConfig(nbits=2), context=5000, batch=2, gpu_memory=2**30)
        assert found == vars(expected)
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert "cache in bfloat16, 2 x 5,000 tokens" in shown and "KIVICache, 2 x 5,000 tokens" in shown


def test_what_cannot_be_estimated_says_so(tmp_path, capsys):
    with pytest.raises(ValueError, match="has a LinearAttentionLayer, whose size its config does not tell"):
        estimate(tiny_model("mamba").config, context=10)
    with pytest.raises(ValueError, match="batch: got 0; allowed: a whole number from 1"):
        estimate(LLAMA, context=10, batch=0)
    with pytest.raises(ValueError, match=f"context: got {10**20}; allowed: a whole number from 1 to {2**40}"):
        estimate(LLAMA, context=10**20)
    with pytest.raises(ValueError, match="model: got the encoder-decoder t5; allowed: decoders"):
        estimate(T5Config(), context=10)
    with pytest.raises(ValueError, match="model: got a vit, which generates no text; allowed: decoders"):
        estimate(ViTConfig(), context=10)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    for model, said in (
        ("none", "model '{}' cannot be loaded: "),
        ("config.json", "'{}' cannot be loaded: Validation error for field 'hidden_size': TypeError: Field"),
    ):
        assert main(["estimate", "--model", str(tmp_path / model), "--context", "10"]) == 2
        assert said.format(tmp_path / model) in capsys.readouterr().err
    for arguments in (["--context", "0"], ["--context", "9", "--gpu-memory", "no"]):
        with pytest.raises(SystemExit):
            main(["estimate", "--model", "x", *arguments])
