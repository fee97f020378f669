import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, Gemma2Config, MambaConfig, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from kivicache import KIVICache, KIVIConfig
from kivicache.layer import KIVILayer
from tests.tiny import prompt, tiny_llama

SMALL = KIVIConfig(nbits=4, group_size=8, residual_length=16, sink_length=3)


def filled(cfg=SMALL, tokens=70, **kwargs):
    cache = KIVICache(cfg, **kwargs)
    with torch.no_grad():
        tiny_llama()(prompt(tokens=tokens)["input_ids"], past_key_values=cache)
    return cache


@pytest.mark.parametrize("given", [{}, {"config": tiny_llama().config}], ids=["lazy", "from_config"])
def test_is_a_dynamic_cache_in_every_answer(given):
    cache, dynamic = filled(**given), DynamicCache(**given)
    with torch.no_grad():
        tiny_llama()(prompt()["input_ids"], past_key_values=dynamic)
    assert isinstance(cache, DynamicCache) and len(cache) == len(dynamic) == 2
    for name in ("is_compileable", "is_initialized", "is_croppable", "is_sliding", "is_linear"):
        assert getattr(cache, name) == getattr(dynamic, name)
    for layer_idx in range(4):
        assert cache.get_seq_length(layer_idx) == dynamic.get_seq_length(layer_idx)
        assert cache.get_mask_sizes(5, layer_idx) == dynamic.get_mask_sizes(5, layer_idx)
        assert cache.get_query_offset(layer_idx) == dynamic.get_query_offset(layer_idx)
        assert cache.get_max_length(layer_idx) == dynamic.get_max_length(layer_idx) == -1
    for (keys, values, sliding), (expected_keys, expected_values, _) in zip(cache, dynamic, strict=True):
        assert keys.shape == expected_keys.shape and values.shape == expected_values.shape and sliding is None
    cache._is_user_defined = True  # generate marks the caches that it is given


def test_operations_reach_every_layer():
    cache = filled()
    keys = [layer.keys for layer in cache.layers]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert all(torch.equal(layer.keys, old.flip(0)) for layer, old in zip(cache.layers, keys, strict=True))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert all(torch.equal(layer.keys, old) for layer, old in zip(cache.layers, keys, strict=True))
    cache.crop(-30)
    assert all(torch.equal(layer.keys, old[:, :, :40]) for layer, old in zip(cache.layers, keys, strict=True))
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized


def test_lengths_may_differ_by_layer():
    cache = filled()
    first = cache.layers[0]
    first.keys, first.values = first.keys[:, :, ::2], first.values[:, :, ::2]
    assert (cache.get_seq_length(0), cache.get_seq_length(1)) == (35, 70)
    assert (cache.get_mask_sizes(1, 0), cache.get_mask_sizes(1, 1)) == ((36, 0), (71, 0))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_has_its_own_layers(duplicate):
    cache = KIVICache(SMALL)
    other = duplicate(cache)  # before there are layers: they must be made in the copy
    with torch.no_grad():
        tiny_llama()(prompt()["input_ids"], past_key_values=other)
    assert len(cache) == 0 and len(other) == 2
    third = duplicate(other)
    third.crop(-60)
    assert (other.get_seq_length(), third.get_seq_length()) == (70, 10)


def test_a_cache_is_freed_at_once():
    """No reference cycle: on a GPU it would hold its memory until the garbage collector comes by."""
    cache = filled()
    alive = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert alive() is None
    finally:
        gc.enable()


def test_what_is_no_model_config_is_refused():
    with pytest.raises(ValueError, match=r"config: got LlamaForCausalLM; allowed: .*model\.config"):
        KIVICache(config=tiny_llama())


def test_early_initialization():
    cache = KIVICache(SMALL, config=tiny_llama().config)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert cache.is_initialized and cache.get_seq_length() == 0
    inputs = prompt()["input_ids"]
    with torch.no_grad():
        logits = tiny_llama()(inputs, past_key_values=cache).logits
        assert torch.equal(logits, tiny_llama()(inputs, past_key_values=KIVICache(SMALL)).logits)


def test_only_full_attention_layers_are_packed():
    config = Gemma2Config(num_hidden_layers=4, sliding_window=16)
    cache, dynamic = KIVICache(SMALL, config=config), DynamicCache(config=config)
    assert [type(layer) for layer in dynamic.layers].count(DynamicSlidingWindowLayer) == 2
    for layer, expected in zip(cache.layers, dynamic.layers, strict=True):
        if isinstance(expected, DynamicSlidingWindowLayer):
            assert type(layer) is type(expected) and layer.sliding_window == expected.sliding_window
        else:
            assert type(layer) is KIVILayer
    assert cache.is_sliding == dynamic.is_sliding
    assert repr(cache).count("2 x") == 2 and "DynamicSlidingWindowLayer" in repr(cache)


def test_settings_for_a_layer_that_is_not_packed_are_refused():
    config = Gemma2Config(num_hidden_layers=4, sliding_window=16)
    sliding = KIVICache(config=config).is_sliding.index(True)
    with pytest.raises(ValueError, match=rf"layers: got layer {sliding}; allowed: \["):
        KIVICache(KIVIConfig(layers={sliding: {"nbits": 2}}), config=config)
    with pytest.raises(ValueError, match=r"heads: got layer 9; allowed: \["):
        KIVICache(KIVIConfig(heads={9: {0: 2}}), config=config)


def test_a_model_with_nothing_to_pack_is_said_aloud(caplog):
    KIVICache(config=MistralConfig(num_hidden_layers=2, sliding_window=8))
    assert "packs nothing" in caplog.text and "2 x DynamicSlidingWindowLayer" in caplog.text


def test_without_a_config_a_linear_attention_model_says_what_to_pass():
    states = torch.randn(1, 4, 3)
    for call in (
        lambda cache: cache.get_conv_state(0),
        lambda cache: cache.get_recurrent_state(0),
        lambda cache: cache.update_conv_state(states, 0),
        lambda cache: cache.update_recurrent_state(states, 0),
        lambda cache: cache.update_indexer(states, 0),
        lambda cache: cache.has_previous_state(0),
    ):
        with pytest.raises(ValueError, match=r"config=model\.config"):
            call(KIVICache())
    cache = KIVICache(config=MambaConfig(num_hidden_layers=2, hidden_size=8, state_size=4))
    assert all(type(layer) is LinearAttentionLayer for layer in cache.layers)
    assert not cache.is_compileable  # DynamicCache is never compiled: neither is a growing cache of ours
    cache.update_conv_state(states, 0)
    assert cache.memory().full_precision > 0


def test_in_an_encoder_decoder_cache():
    cache = EncoderDecoderCache(filled(), filled(tokens=30))
    assert cache.get_seq_length() == 70 and cache.is_updated == {0: True, 1: True}
    cache.crop(-10)
    assert cache.get_seq_length() == 60 and cache.cross_attention_cache.get_seq_length() == 30
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    assert cache.get_seq_length() == 0


def test_layers_may_lie_on_different_devices():
    """Each layer's stores lie where its first keys are; the meta device stands in for a second GPU."""
    cache = KIVICache(SMALL)
    for layer_idx, device in enumerate(("cpu", "meta")):
        states = torch.randn(1, 2, 50, 16, device=device)
        keys, _ = cache.update(states, states, layer_idx)
        keys, _ = cache.update(states[:, :, :1], states[:, :, :1], layer_idx)
        assert keys.device.type == device
        buffers = [b for side in cache.layers[layer_idx]._states() for store in side._stores() for b in
                   getattr(store, "buffers", [store])]  # fmt: skip
        assert {buffer.data.device.type for buffer in buffers} == {device}


@pytest.mark.gpu
def test_offloading_on_a_gpu():
    model, inputs = copy.deepcopy(tiny_llama()).cuda(), {k: v.cuda() for k, v in prompt().items()}
    kwargs = {"max_new_tokens": 40, "do_sample": False}
    expected = model.generate(**inputs, past_key_values=KIVICache(SMALL, config=model.config), **kwargs)
    cache = KIVICache(SMALL, config=model.config, offloading=True)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **kwargs), expected)
