"""The cache beside what people use: presses, pipelines, chats over several turns, streamers."""

import contextlib

import pytest
import torch
from transformers import DynamicCache, TextStreamer, pipeline

from kivicache import KIVICache, KIVIConfig
from tests.tiny import prompt, tiny_llama, word_tokenizer

COARSE = KIVIConfig(nbits=2, group_size=8, residual_length=8, sink_length=4)
CHAT = (
    "{% for m in messages %}{{ 'w90 ' if m.role == 'user' else 'w91 ' }}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w91 {% endif %}"
)


@contextlib.contextmanager
def press(model, cache, keep):
    """What a kvpress press does: behind each layer's prefill, it reads its keys and values, and assigns fewer."""

    def hook(module, args, kwargs, output):
        layer = cache.layers[module.layer_idx]
        if kwargs["hidden_states"].shape[1] == layer.get_seq_length():  # the prefill
            kept = layer.keys.norm(dim=-1).topk(keep, largest=False).indices.sort().values[..., None]
            keys = layer.keys.gather(2, kept.expand(-1, -1, -1, layer.keys.shape[-1]))
            values = layer.values.gather(2, kept.expand(-1, -1, -1, layer.values.shape[-1]))
            layer.keys, layer.values = keys, values
        return output

    layers = model.model.layers
    hooks = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@torch.no_grad()
def pressed(cache, inputs, keep=40, steps=6):
    """The logits of the steps behind a compressed prompt."""
    model = tiny_llama()
    with press(model, cache, keep):
        model(inputs["input_ids"], past_key_values=cache)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    next_ids = torch.arange(5, 5 + steps)[None]
    positions = torch.arange(70, 70 + steps)[None]
    logits = [
        model(next_ids[:, i : i + 1], past_key_values=cache, position_ids=positions[:, i : i + 1]).logits
        for i in range(steps)
    ]
    return lengths, torch.cat(logits, dim=1)


def test_a_press_compresses_then_the_cache_quantizes():
    inputs = prompt(batch=1)
    expected_lengths, expected = pressed(DynamicCache(), inputs)
    lengths, exact = pressed(KIVICache(KIVIConfig(nbits=16)), inputs)
    assert lengths == expected_lengths == [40, 40]
    assert torch.equal(exact, expected)
    cache = KIVICache(COARSE)
    lengths, coarse = pressed(cache, inputs)
    assert lengths == [40, 40] and cache.get_seq_length() == 46
    assert cache.memory().packed_values > 0
    assert not torch.equal(coarse, expected)
    fine = KIVICache(KIVIConfig(nbits=8, group_size=8, residual_length=8, sink_length=4))
    assert (pressed(fine, inputs)[1] - expected).norm() < 0.1 * (coarse - expected).norm()


@pytest.mark.parametrize("config", [KIVIConfig(nbits=16), COARSE])
def test_a_press_forgets_the_answer(config):
    """kvpress asks several questions of one context: it slices each answer off again."""
    model, context = tiny_llama(), prompt(batch=1)["input_ids"]
    first, second = prompt(batch=1, tokens=7)["input_ids"], prompt(batch=1, tokens=5)["input_ids"]
    cache = KIVICache(config)
    with torch.no_grad():
        model(context, past_key_values=cache)
    packed = cache.layers[0].keys[:, :, 4:52].clone()

    def answer(question, cache):
        whole = torch.cat([context, question], dim=1)
        new = model.generate(whole, past_key_values=cache, max_new_tokens=20, do_sample=False)
        return new[0, whole.shape[1] :].tolist()

    answer(first, cache)
    for layer in cache.layers:
        layer.keys = layer.keys[:, :, :70]
        layer.values = layer.values[:, :, :70]
    assert cache.get_seq_length() == 70
    assert torch.equal(cache.layers[0].keys[:, :, 4:52], packed)
    again = answer(second, cache)
    assert len(again) == 20
    if config.nbits_key == 16:
        assert again == answer(second, DynamicCache())


@pytest.mark.parametrize("config", [KIVIConfig(nbits=16), COARSE])
def test_pipeline(config):
    model, words = tiny_llama(), " ".join(f"w{3 + i * 7 % 90}" for i in range(60))
    generate = pipeline("text-generation", model=model, tokenizer=word_tokenizer())
    cache = KIVICache(config, config=model.config)
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    text = generate(words, past_key_values=cache, **options)[0]["generated_text"]
    assert cache.get_seq_length() == 60 + 12 - 1
    input_ids = word_tokenizer()(words, return_tensors="pt").input_ids
    output = model.generate(input_ids, past_key_values=KIVICache(config), max_new_tokens=12, do_sample=False)
    assert text == word_tokenizer().decode(output[0, 60:], skip_special_tokens=True) != ""


def encoded(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


@pytest.mark.parametrize("config", [KIVIConfig(nbits=16), COARSE])
def test_a_chat_goes_on_over_turns(config):
    """Only what is new is fed: the history is read from the cache, and no code of it changes."""
    model, tokenizer = tiny_llama(), word_tokenizer()
    tokenizer.chat_template = CHAT
    cache, exact, messages, seen = KIVICache(config, config=model.config), DynamicCache(), [], []
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    for turn in range(3):
        question = " ".join(f"w{3 + (turn + i * 11) % 80}" for i in range(20))
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = inputs["input_ids"].shape[1]
        output = model.generate(**inputs, past_key_values=cache, **options)
        assert cache.get_seq_length() == tokens + 10 - 1
        if config.nbits_key == 16:
            expected = model.generate(
                **inputs, past_key_values=exact, max_new_tokens=10, do_sample=False, pad_token_id=0
            )
            assert torch.equal(output, expected)
        packed = cache.layers[0].keys[:, :, 4:12].clone()
        assert not seen or torch.equal(packed, seen[0])
        seen = seen or [packed]
        answer = tokenizer.decode(output[0, tokens:])
        messages.append({"role": "assistant", "content": answer})


def test_a_streamer_prints_what_is_generated(capsys):
    model, tokenizer, inputs = tiny_llama(), word_tokenizer(), prompt(batch=1)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    output = model.generate(
        **inputs, past_key_values=KIVICache(COARSE), streamer=streamer, max_new_tokens=12, do_sample=False
    )
    assert capsys.readouterr().out.split() == tokenizer.decode(output[0, 70:]).split() != []
