"""Tiny random models of many architectures through ``generate``, held against ``DynamicCache``."""

import logging
import sys
from functools import cache

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer

from kivicache import KIVICache, KIVIConfig
from kivicache.layer import KIVILayer
from tests.architectures import DECODERS, ENCODER_DECODERS, tiny_model

BATCH, PROMPT_LENGTH, PADDING = 2, 40, 7
NEW_TOKENS = 8
CACHED = PROMPT_LENGTH + NEW_TOKENS - 1  # the last token is never fed back
CAPACITY = CACHED + 6
PACKED = 32  # of the cached ones, with the lengths below: 24 of the prompt, and a block of 8 while decoding
LENGTHS = {"group_size": 8, "residual_length": 8, "sink_length": 4}
SIXTEEN_BITS = KIVIConfig(nbits=16, **LENGTHS)
FOUR_BITS = KIVIConfig(nbits=4, **LENGTHS)

# Layers that a cache can stand in for without knowing the model: a sliding window is only a mask then, and a layer
# that uses the keys and values of another never asks.
PLAIN_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}


def parametrized(model_types):
    """One test for each model type, skipped where the installed transformers does not have it."""
    version = transformers.__version__
    missing = {t: [pytest.mark.skip(f"not in transformers {version}")] for t in model_types if t not in CONFIG_MAPPING}
    return pytest.mark.parametrize("model_type", [pytest.param(t, marks=missing.get(t, ())) for t in model_types])


every_decoder = parametrized(DECODERS)
every_encoder_decoder = parametrized(ENCODER_DECODERS)


def prompt():
    """A batch of prompts, the last of them shorter and padded on the left."""
    ids = torch.randint(3, 96, (BATCH, PROMPT_LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[-1, :PADDING] = mask[-1, :PADDING] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, past_key_values, max_new_tokens=NEW_TOKENS, **inputs):
    """Token ids ``[batch, tokens]`` and logits ``[steps, batch, vocabulary]`` of greedy decoding."""
    cache_name = "cache_params" if "mamba" in model.config.model_type else "past_key_values"
    torch.manual_seed(0)
    output = model.generate(
        **(inputs or prompt()),
        **{cache_name: past_key_values},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences, torch.stack(output.logits)


@cache
def reference(model_type):
    """What the model says with a ``DynamicCache``, and that cache."""
    model = tiny_model(model_type)
    past_key_values = DynamicCache(config=model.config)
    sequences, logits = generate(model, past_key_values)
    assert logits.isfinite().all() and sequences.shape == (BATCH, PROMPT_LENGTH + NEW_TOKENS)
    return sequences, logits, past_key_values


def assert_identical(output, expected):
    for ours, theirs in zip(output, expected, strict=True):
        assert torch.equal(ours, theirs)


def assert_same_content(ours, theirs):
    assert len(ours.layers) == len(theirs.layers)
    for our_layer, their_layer in zip(ours.layers, theirs.layers, strict=True):
        for name in ("keys", "values"):
            our_states, their_states = getattr(our_layer, name, None), getattr(their_layer, name, None)
            assert (our_states is None) == (their_states is None)
            assert our_states is None or torch.equal(our_states, their_states)


@every_decoder
def test_packs_full_attention_layers_and_leaves_every_other_layer_as_it_is(model_type):
    model = tiny_model(model_type)
    ours, theirs = KIVICache(FOUR_BITS, config=model.config), DynamicCache(config=model.config)
    assert len(ours) == len(theirs)
    for layer_idx, (our_layer, their_layer) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        if type(their_layer) is DynamicLayer:
            assert type(our_layer) is KIVILayer
            assert our_layer.config == FOUR_BITS.layer(layer_idx)
        else:
            assert type(our_layer) is type(their_layer)
            assert vars(our_layer) == vars(their_layer)
    for kind in ("is_sliding", "is_linear", "is_dummy"):  # masks are chosen by these; 5.17 has no is_dummy
        assert getattr(ours, kind, None) == getattr(theirs, kind, None)


@every_decoder
def test_16_bits_are_identical_to_dynamic_cache(model_type):
    model = tiny_model(model_type)
    *expected, expected_cache = reference(model_type)
    past_key_values = KIVICache(SIXTEEN_BITS, config=model.config)
    assert_identical(generate(model, past_key_values), expected)
    assert_same_content(past_key_values, expected_cache)


@every_decoder
def test_4_bits_hold_packed_bytes_that_the_attention_reads(model_type):
    model = tiny_model(model_type)
    expected_sequences, expected_logits, expected_cache = reference(model_type)
    past_key_values = KIVICache(FOUR_BITS, config=model.config)
    sequences, logits = generate(model, past_key_values)
    assert sequences.shape == expected_sequences.shape
    assert logits.isfinite().all()
    assert torch.equal(logits[0], expected_logits[0])  # a prompt attends to its own exact keys and values

    packed = [idx for idx, layer in enumerate(past_key_values.layers) if isinstance(layer, KIVILayer)]
    assert packed == [idx for idx, layer in enumerate(expected_cache.layers) if type(layer) is DynamicLayer]
    assert torch.equal(logits, expected_logits) == (not packed)
    for layer_idx, memory in enumerate(past_key_values.memory().layers):
        if layer_idx in packed:
            assert past_key_values.get_seq_length(layer_idx) == CACHED
            assert memory.packed_values * CACHED == memory.values * PACKED > 0
            assert memory.codes * 2 == memory.packed_values  # two codes of 4 bits to a byte
        else:
            assert memory.codes == memory.packed_values == 0
    if packed:
        assert past_key_values.get_seq_length() == CACHED


# recurrent_gemma keeps its states in its own modules and reads the list of layers itself, so that neither cache can
# say anything: without a config it works on transformers 5.23 and fails on 5.17, with DynamicCache() just the same.
@parametrized([model_type for model_type in DECODERS if model_type != "recurrent_gemma"])
def test_without_config_a_model_just_works_or_the_error_says_what_to_pass(model_type):
    model = tiny_model(model_type)
    past_key_values = KIVICache(SIXTEEN_BITS)
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    if kinds <= PLAIN_LAYERS:
        plain_cache = DynamicCache()
        assert_identical(generate(model, past_key_values), generate(model, plain_cache))
        assert_same_content(past_key_values, plain_cache)
        assert all(type(layer) is KIVILayer for layer in past_key_values.layers)
    else:
        with pytest.raises((ValueError, AttributeError), match=r"config=model\.config"):
            generate(model, past_key_values)


# gpt_neo takes the last places of a static cache for the newest tokens, in StaticCache just the same.
@parametrized([model_type for model_type in DECODERS if model_type != "gpt_neo"])
@pytest.mark.parametrize("exact_layer", [False, True], ids=["packed", "beside_16_bits"])
def test_a_fixed_capacity_changes_no_token(model_type, exact_layer):
    model = tiny_model(model_type)
    full = [i for i, layer in enumerate(KIVICache(config=model.config).layers) if isinstance(layer, KIVILayer)]
    if not full:
        pytest.skip("the model has no full-attention layer")
    try:
        generate(model, StaticCache(config=model.config, max_cache_len=CAPACITY))
    except TypeError as error:  # llama4_text on transformers 5.17
        pytest.skip(f"transformers' own StaticCache does not serve the model: {error}")
    if model_type == "bloom" and hasattr(sys.modules[type(model).__module__], "StaticCache"):
        pytest.skip(f"bloom takes no other fixed cache than StaticCache on transformers {transformers.__version__}")
    config = KIVIConfig(nbits=4, layers={full[-1]: {"nbits": 16}} if exact_layer else {}, **LENGTHS)
    expected, logits = generate(model, KIVICache(config, config=model.config))
    fixed = KIVICache(config, config=model.config, max_cache_len=CAPACITY)
    sequences, fixed_logits = generate(model, fixed)
    assert torch.equal(sequences, expected)
    assert torch.allclose(fixed_logits[0], logits[0], atol=1e-3)  # later ones: where a code turned over, less close


WIDTHS = {  # kv heads and head_dim of the keys, and of the values
    "gpt2": ((4, 8), (4, 8)),
    "llama": ((2, 8), (2, 8)),
    "falcon": ((1, 8), (1, 8)),
    "gpt_bigcode": ((1, 8), (1, 8)),
    "gemma4_text": ((2, 16), (2, 16)),
    "deepseek_v3": ((1, 16), (1, 8)),  # MLA caches the latents and the rotary part of the keys
    "mimo_v2_flash": ((2, 24), (2, 16)),
}


@parametrized(WIDTHS)
def test_keys_and_values_have_the_model_s_heads_and_widths(model_type):
    past_key_values = KIVICache(FOUR_BITS, config=tiny_model(model_type).config)
    generate(tiny_model(model_type), past_key_values)
    layer = next(layer for layer in past_key_values.layers if isinstance(layer, KIVILayer))
    for states, (kv_heads, head_dim) in zip((layer.keys, layer.values), WIDTHS[model_type], strict=True):
        assert states.shape == (BATCH, kv_heads, CACHED, head_dim)


@parametrized(["mistral", "mamba2", "falcon_h1", "glm_moe_dsa"])
def test_says_when_a_model_has_nothing_to_pack(model_type, caplog):
    with caplog.at_level(logging.WARNING, logger="kivicache"):
        past_key_values = KIVICache(FOUR_BITS, config=tiny_model(model_type).config)
    assert "packs nothing" in caplog.text
    assert not past_key_values.is_compileable  # it grows; only a cache of fixed shapes may be compiled


# Longer than a decoder's answer: the decoder starts from one token, and its own cache has to fill up.
DECODED = 20
DECODED_PACKED, ENCODED_PACKED = 8, 24


def generate_from_encoder(model, make_cache):
    if model.main_input_name == "input_features":  # speech: two frames become one token
        features = torch.randn(BATCH, 8, 2 * PROMPT_LENGTH, generator=torch.Generator().manual_seed(0))
        inputs = {"input_features": features}
    else:
        inputs = prompt()
    past_key_values = EncoderDecoderCache(make_cache(), make_cache())
    return past_key_values, generate(model, past_key_values, max_new_tokens=DECODED, **inputs)


@pytest.mark.parametrize("with_config", [True, False], ids=["config", "no_config"])
@every_encoder_decoder
def test_encoder_decoders(model_type, with_config):
    model = tiny_model(model_type)
    config = model.config if with_config else None
    _, expected = generate_from_encoder(model, lambda: DynamicCache(config=config))
    _, exact = generate_from_encoder(model, lambda: KIVICache(SIXTEEN_BITS, config=config))
    assert_identical(exact, expected)

    past_key_values, (sequences, logits) = generate_from_encoder(model, lambda: KIVICache(FOUR_BITS, config=config))
    assert sequences.shape == expected[0].shape
    assert torch.equal(logits[0], expected[1][0]) and not torch.equal(logits, expected[1])
    assert past_key_values.get_seq_length() == DECODED
    for half, length, packed in (
        (past_key_values.self_attention_cache, DECODED, DECODED_PACKED),
        (past_key_values.cross_attention_cache, PROMPT_LENGTH, ENCODED_PACKED),
    ):
        assert [layer.get_seq_length() for layer in half.layers] == [length] * 2
        for memory in half.memory().layers:
            assert memory.codes * 2 == memory.packed_values > 0
            assert memory.packed_values * length == memory.values * packed
