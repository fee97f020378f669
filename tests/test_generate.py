"""Every way of generating, on an unmodified model.

At 16 bits all of it is bit-identical to DynamicCache. Below, it is identical to a reference cache that keeps dense
fake-quantized tensors.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

from kivicache import KIVICache, KIVIConfig
from tests.reference import reference_cache
from tests.tiny import prompt, tiny_llama

SMALL = {"group_size": 8, "residual_length": 16, "sink_length": 3}
CONFIGS = {
    "16_bits": KIVIConfig(nbits=16, **SMALL),
    "8_bits": KIVIConfig(nbits=8, **SMALL),
    "4_bits": KIVIConfig(nbits=4, **SMALL),
    "2_bits": KIVIConfig(nbits=2, **SMALL),
    "paper_2_bits": KIVIConfig(nbits=2, group_size=8, residual_length=16, sink_length=0, policy="paper"),
    "by_layer": KIVIConfig(nbits=2, layers={0: {"nbits_key": 16, "nbits_value": 4}, 1: {"group_size": -1}}, **SMALL),
}
WAYS = {
    "greedy": {},
    "greedy_long": {"max_new_tokens": 60},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam_search": {"num_beams": 3},
    "beam_sampling": {"num_beams": 3, "do_sample": True, "top_k": 20},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 2},
    "return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunked_prefill": {"prefill_chunk_size": 13},
    "prompt_lookup": {"prompt_lookup_num_tokens": 4, "batch": 1, "repeat": True},
    "assisted": {"assistant": True, "batch": 1},
    "assisted_sampling": {"assistant": True, "batch": 1, "do_sample": True},
}


def other_cache(config):
    """What KIVICache is held against: DynamicCache itself, or the dense reference."""
    bits = {config.nbits_key, config.nbits_value}
    return DynamicCache() if bits == {16} else reference_cache(config, layers=2)


def generate(model, inputs, cache, **kwargs):
    torch.manual_seed(1234)
    kwargs = {"max_new_tokens": 25, "do_sample": False, **kwargs}
    with torch.no_grad():
        return model.generate(
            **inputs, past_key_values=cache, return_dict_in_generate=True, output_scores=True, **kwargs
        )


def assert_identical(output, expected):
    assert torch.equal(output.sequences, expected.sequences)
    assert len(output.scores) == len(expected.scores)
    for scores, expected_scores in zip(output.scores, expected.scores, strict=True):
        assert torch.equal(scores, expected_scores)


def assert_same_content(cache, other):
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)


@pytest.mark.parametrize("padding", [0, 9], ids=["", "left_padded"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("way", WAYS)
def test_way_of_generating(way, config, padding):
    model, kwargs = tiny_llama(), dict(WAYS[way])
    inputs = prompt(kwargs.pop("batch", 2), padding=padding)
    if kwargs.pop("repeat", False):  # text that repeats itself, so that looked-up tokens are accepted and refused
        inputs["input_ids"][:, 40:] = inputs["input_ids"][:, 10:40]
    if kwargs.pop("assistant", False):
        kwargs["assistant_model"] = draft_of(model)
    cache, other = KIVICache(config), other_cache(config)
    output = generate(model, inputs, cache, **kwargs)
    expected = generate(model, inputs, other, **kwargs)
    assert_identical(output, expected)
    assert_same_content(cache, other)
    if {config.nbits_key, config.nbits_value} != {16}:
        assert cache.memory().codes > 0


def draft_of(model):
    """A draft model that agrees with ``model`` often, not always: its own weights, slightly disturbed."""
    draft = copy.deepcopy(model)
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return draft


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_inputs_embeds(config, attention):
    model = tiny_llama(attention=attention)
    inputs = prompt()
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    embeds["attention_mask"] = inputs["attention_mask"]
    assert_identical(generate(model, embeds, KIVICache(config)), generate(model, embeds, other_cache(config)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_several_turns_on_one_cache(config):
    model, caches = tiny_llama(), (KIVICache(config, config=tiny_llama().config), other_cache(config))
    history = prompt()["input_ids"]
    for question in (0, 11, 45, 1):
        history = torch.cat([history, prompt(tokens=question)["input_ids"]], dim=1)
        inputs = {"input_ids": history, "attention_mask": torch.ones_like(history)}
        output, expected = (generate(model, inputs, cache) for cache in caches)
        assert_identical(output, expected)
        history = output.sequences
    assert_same_content(*caches)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_shared_prefix_with_several_continuations(config):
    model, prefix = tiny_llama(), prompt(batch=1, tokens=50)["input_ids"]
    caches = KIVICache(config), other_cache(config)
    with torch.no_grad():
        for cache in caches:
            model(prefix, past_key_values=cache)
    for tokens in (1, 7, 30):
        question = torch.cat([prefix, prompt(batch=1, tokens=tokens)["input_ids"]], dim=1)
        inputs = {"input_ids": question, "attention_mask": torch.ones_like(question)}
        output, expected = (generate(model, inputs, copy.deepcopy(cache)) for cache in caches)
        assert_identical(output, expected)
    assert caches[0].get_seq_length() == 50  # the continuations did not touch the prefix


def test_a_cache_that_was_reset_is_as_new():
    model, cache = tiny_llama(), KIVICache(CONFIGS["4_bits"])
    first, second = prompt(batch=3), prompt(batch=2)
    generate(model, first, cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.memory().total == 0
    assert_identical(generate(model, second, cache), generate(model, second, KIVICache(CONFIGS["4_bits"])))


def test_prefill_in_pieces_is_one_prefill_where_nothing_is_lost():
    model, inputs = tiny_llama(), prompt()["input_ids"]
    whole, pieces = KIVICache(CONFIGS["16_bits"]), KIVICache(CONFIGS["16_bits"])
    with torch.no_grad():
        model(inputs, past_key_values=whole)
        for piece in inputs.split([1, 30, 5, 34], dim=1):
            model(piece, past_key_values=pieces)
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        assert torch.allclose(one.keys, other.keys, atol=1e-5)


def test_the_first_prompt_attends_to_exact_keys_and_values():
    model, inputs = tiny_llama(), prompt()
    with torch.no_grad():
        exact = model(**inputs, past_key_values=DynamicCache()).logits
        assert torch.equal(model(**inputs, past_key_values=KIVICache(CONFIGS["2_bits"])).logits, exact)


def test_fewer_bits_drift_further_from_full_precision():
    """Teacher forcing through the cache: what the packed history costs in logits falls with the bits."""
    model, inputs = tiny_llama(seed=1), prompt(tokens=120)["input_ids"]

    def logits(cache):
        with torch.no_grad():
            model(inputs[:, :60], past_key_values=cache)
            return torch.cat([model(t, past_key_values=cache).logits for t in inputs[:, 60:].split(1, dim=1)], dim=1)

    exact = logits(DynamicCache()).log_softmax(-1)
    kl = [
        torch.nn.functional.kl_div(
            logits(KIVICache(CONFIGS[name])).log_softmax(-1), exact, log_target=True, reduction="batchmean"
        ).item()
        for name in ("2_bits", "4_bits", "8_bits", "16_bits")
    ]
    assert kl[0] > 3 * kl[1] > 9 * kl[2] > kl[3] == 0.0


@pytest.mark.parametrize("config", ["2_bits", "paper_2_bits"])
def test_a_growing_cache_in_a_model_compiled_by_hand(config, monkeypatch):
    model, inputs, cache = tiny_llama(layers=1), prompt(padding=9), KIVICache(CONFIGS[config])
    expected = generate(model, inputs, KIVICache(CONFIGS[config])).sequences
    torch._dynamo.reset()
    monkeypatch.setattr(model, "forward", torch.compile(model.forward, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=64):  # a wrapper of transformers is compiled once for each module
        assert torch.equal(generate(model, inputs, cache).sequences, expected)
    states = cache.layers[0]._keys.residual
    assert {type(number) for number in (states.start, states.stop, *states.strides)} == {int}
    torch._dynamo.reset()


def test_a_graph_that_may_not_break_is_told_which_cache_to_take():
    model = tiny_llama(layers=1)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"one graph takes KIVICache\(max_cache_len=\.\.\.\)"):
        torch.compile(model, fullgraph=True, backend="eager")(**prompt(), past_key_values=KIVICache())
    torch._dynamo.reset()
