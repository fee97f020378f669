"""The seam: packed states in a model's own attention."""

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

pytest.importorskip("triton")

from kivicache import KIVICache, KIVIConfig, attention
from kivicache.attention import PackedStates, kivi_attention_forward
from kivicache.layer import KIVILayer
from tests.tiny import prompt, tiny_llama

SMALL = {"residual_length": 8, "sink_length": 4}


@pytest.fixture
def fused_on_the_cpu(monkeypatch):
    monkeypatch.setattr(attention, "FUSED_DEVICES", ["cpu", "cuda"])


def packed(tokens=44, config=None, kv_heads=2, head_dim=64, batch=2):
    """A layer's packed keys and values after one decoded token, and the dense tensors that they stand for."""
    layer = KIVILayer((config or KIVIConfig(nbits=4, **SMALL)).layer(0))
    states = [torch.randn(batch, kv_heads, tokens, head_dim) for _ in range(2)]
    layer.update(*states)
    dense = [torch.cat([old, states[0][:, :, :1]], dim=2) for old in (layer.keys, layer.values)]
    return layer.update(states[0][:, :, :1], states[0][:, :, :1]), dense


def test_packed_states_become_dense_under_any_operation(fused_on_the_cpu):
    (keys, values), (dense_keys, dense_values) = packed()
    assert isinstance(keys, PackedStates) and isinstance(values, PackedStates)
    assert (keys.shape, keys.dtype, keys.device) == (dense_keys.shape, dense_keys.dtype, dense_keys.device)
    for operation in (
        lambda x: x + 1,
        lambda x: x @ x.mT,
        lambda x: x[:, :, :3],
        lambda x: x[0],
        lambda x: x.transpose(1, 2).reshape(2, -1, 128),
        lambda x: x.reshape(-1),
        lambda x: x.expand(2, 2, 45, 64),
        lambda x: torch.cat([x, x], dim=2),
        lambda x: x.contiguous().to(torch.float64),
        lambda x: x.clone(),
    ):
        result = operation(values)
        assert type(result) is torch.Tensor
        assert torch.equal(result, operation(dense_values))


def test_the_repetition_of_heads_stays_packed(fused_on_the_cpu):
    (keys, _), (dense, _) = packed()
    repeated = repeat_kv(keys, 3)
    assert isinstance(repeated, PackedStates) and repeated.shape == (2, 6, 45, 64)
    assert torch.equal(repeated + 0, repeat_kv(dense, 3))


def test_what_was_handed_out_does_not_change_when_tokens_are_packed_or_added(fused_on_the_cpu):
    layer = KIVILayer(KIVIConfig(nbits=2, **SMALL).layer(0))
    states = torch.randn(1, 2, 100, 64)
    layer.update(states, states)
    for step in range(70):
        token = torch.randn(1, 2, 1, 64)
        expected = torch.cat([layer.keys, token], dim=2)
        keys, _ = layer.update(token, token)
        assert isinstance(keys, PackedStates)
        assert torch.equal(keys.dense(), expected), step


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-12),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: [side.to("meta") for side in layer._states()] if layer.offload() else None,
    ],
    ids=["crop", "reorder", "offload"],
)
def test_what_was_handed_out_does_not_change_with_the_cache(fused_on_the_cpu, change):
    layer = KIVILayer(KIVIConfig(nbits=4, **SMALL).layer(0))
    states, token = torch.randn(2, 2, 47, 64), torch.randn(2, 2, 1, 64)
    layer.update(states, states)
    expected = torch.cat([layer.keys, token], dim=2)
    keys, _ = layer.update(token, token)
    assert isinstance(keys, PackedStates)
    change(layer)
    assert keys.kivi_states is not layer._keys and torch.equal(keys.dense(), expected)


GRID = {  # name: (query heads, query tokens, mask, config)
    "gqa": (6, 1, None, KIVIConfig(nbits=2, **SMALL)),
    "mha_padded": (2, 1, "bool", KIVIConfig(nbits_key=4, nbits_value=2, **SMALL)),
    "verification": (4, 3, "bool", KIVIConfig(nbits=8, **SMALL)),
    "additive": (4, 1, "additive", KIVIConfig(nbits=4, **SMALL)),
    "paper": (4, 1, None, KIVIConfig(nbits=4, policy="paper", residual_length=32, sink_length=0)),
}


@pytest.mark.parametrize(("heads", "tokens", "kind", "config"), GRID.values(), ids=GRID)
def test_scaled_dot_product_attention_is_fused(fused_on_the_cpu, monkeypatch, heads, tokens, kind, config):
    (keys, values), (dense_keys, dense_values) = packed(70, config)
    query = torch.randn(2, heads, tokens, 64)
    mask = None if kind is None else torch.rand(2, 1, tokens, 71) > 0.3
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    monkeypatch.setattr(PackedStates, "dense", lambda self: pytest.fail("went dense"))
    output = scaled_dot_product_attention(query, repeat_kv(keys, heads // 2), repeat_kv(values, heads // 2), mask)
    monkeypatch.undo()
    repeated = (repeat_kv(x, heads // 2).double() for x in (dense_keys, dense_values))
    expected = scaled_dot_product_attention(query.double(), *repeated, mask if kind != "additive" else mask.double())
    assert (output - expected).norm() / expected.norm() < 1e-4


class _Attention(torch.nn.Module):
    num_key_value_groups, is_causal = 2, True


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_the_kivi_attention_over_packed_and_plain_states(fused_on_the_cpu, softcap, sinks):
    (keys, values), dense = packed()
    query, s_aux = torch.randn(2, 4, 1, 64), torch.randn(4) if sinks else None
    results = [
        kivi_attention_forward(_Attention(), query, *states, None, scaling=0.2, softcap=softcap, s_aux=s_aux)[0]
        for states in ((keys, values), dense)
    ]
    scores = query.double() @ repeat_kv(dense[0], 2).double().mT * 0.2
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True) + (s_aux.double().exp().view(1, 4, 1, 1) if sinks else 0)
    expected = (weights / total @ repeat_kv(dense[1], 2).double()).transpose(1, 2)
    for result in results:
        assert (result - expected).norm() / expected.norm() < 1e-4


def test_a_masked_prompt_of_the_kivi_attention():
    query, states = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64)
    plain, _ = kivi_attention_forward(_Attention(), query, states, states, None)
    capped, _ = kivi_attention_forward(_Attention(), query, states, states, None, softcap=1e6)
    assert (plain - capped).norm() / plain.norm() < 1e-4  # causal both times


def test_the_kivi_attention_looks_both_ways_where_the_module_does():
    """Encoders and cross-attention come without a mask, too."""
    module = _Attention()
    module.is_causal = False
    query, states = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 12, 64)
    expected = scaled_dot_product_attention(query, repeat_kv(states, 2), repeat_kv(states, 2)).transpose(1, 2)
    for softcap in (None, 1e6):
        output, _ = kivi_attention_forward(module, query, states, states, None, softcap=softcap)
        assert (output - expected).norm() / expected.norm() < 1e-4
    output, _ = kivi_attention_forward(_Attention(), query, states, states, None, softcap=1e6, is_causal=False)
    assert (output - expected).norm() / expected.norm() < 1e-4


def test_a_bias_beside_softcap_is_refused_and_not_dropped():
    query, states = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64)
    with pytest.raises(ValueError, match="position_bias: allowed without softcap"):
        kivi_attention_forward(_Attention(), query, states, states, None, softcap=5.0, position_bias=torch.zeros(9, 9))


def test_dropout_with_softcap():
    query, states = torch.randn(2, 4, 9, 64), torch.ones(2, 2, 9, 64)
    output, _ = kivi_attention_forward(_Attention(), query, states, states, None, dropout=0.5, softcap=50.0)
    assert output.std() > 0.1 and abs(output.mean() - 1) < 0.5  # of values that are all 1
    output, _ = kivi_attention_forward(_Attention(), query, states, states, None, dropout=1.0, softcap=50.0)
    assert not output.any()


def test_what_is_written_into_the_states_is_attended_to(fused_on_the_cpu):
    for repeats in (1, 2):
        (keys, values), _ = packed()
        query = torch.randn(2, 2 * repeats, 1, 64)
        keys.mul_(0.0)
        output = scaled_dot_product_attention(query, repeat_kv(keys, repeats), repeat_kv(values, repeats))
        expected = repeat_kv(values.mean(dim=2, keepdim=True), repeats)
        assert torch.allclose(output, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "kivi", "eager"])
def test_generates_the_same_tokens_as_the_dense_path(fused_on_the_cpu, monkeypatch, name):
    config = KIVIConfig(nbits=2, **SMALL)
    model, inputs = tiny_llama(layers=1, head_dim=64, attention=name), prompt(tokens=50, padding=7)
    kwargs = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cache = KIVICache(config)
    output = model.generate(**inputs, past_key_values=cache, **kwargs)
    assert cache.explain() == {0: "packed"}
    monkeypatch.setattr(attention, "FUSED_DEVICES", ["cuda"])
    expected = model.generate(**inputs, past_key_values=KIVICache(config), **kwargs)
    assert torch.equal(output.sequences, expected.sequences)
    logits, expected_logits = torch.stack(output.logits), torch.stack(expected.logits)
    assert (logits - expected_logits).norm() / expected_logits.norm() < 1e-4


def test_explains_which_path_each_layer_takes(fused_on_the_cpu):
    layers = {1: {"rotation": "hadamard"}, 2: {"nbits_value": 16}, 5: {"nbits": 16}, 6: {"rotation": "hadamard"}}
    config = KIVIConfig(layers=layers, heads={3: {0: 8}, 6: {1: {"nbits_value": 16}}}, nbits_key=4, nbits_value=4)
    cache = KIVICache(config)
    for layer_idx in range(9):
        states = torch.randn(1, 2, 10, 288 if layer_idx == 7 else 64)
        states = states.double() if layer_idx == 8 else states
        cache.update(states, states[..., :32] if layer_idx == 4 else states, layer_idx)
    explained = cache.explain()
    assert [explained[layer_idx] for layer_idx in range(5)] == ["packed"] * 5
    for layer_idx, reason in enumerate(("nothing is packed", "values are rotated", "over 256", "float64"), start=5):
        assert explained[layer_idx].startswith("dense: ") and reason in explained[layer_idx]


def test_the_model_s_attention_is_a_reason(fused_on_the_cpu):
    model = copy.deepcopy(tiny_llama(layers=1))
    states = torch.randn(2, 1, 2, 9, 16)
    for capacity, fused in ((None, ("sdpa", "kivi")), (32, ("kivi",))):
        cache = KIVICache(KIVIConfig(**SMALL), config=model.config, max_cache_len=capacity)
        cache.update(*states, 0)
        for name in ("sdpa", "kivi", "eager"):
            model.set_attn_implementation(name)
            assert (cache.explain() == {0: "packed"}) == (name in fused)
            assert name in fused or f'the attention "{name}" sees dense tensors' in cache.explain()[0]


FORMATS = {
    "rotated": KIVIConfig(nbits=4, rotation="hadamard", **SMALL),
    "mixed heads": KIVIConfig(nbits=2, heads={0: {0: 8, 1: {"nbits_key": 4}}}, **SMALL),
    "16-bit values, rotated keys": KIVIConfig(nbits_key=4, nbits_value=16, rotation="hadamard", **SMALL),
    "a 16-bit head": KIVIConfig(nbits=4, heads={0: {1: 16}}, **SMALL),
    "per token": KIVIConfig(nbits=4, group_size=-1, **SMALL),
    "paper, rotated": KIVIConfig(nbits=4, policy="paper", residual_length=32, sink_length=0, rotation="hadamard"),
}


@pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("steps", [1, 40])
def test_every_format_is_fused(fused_on_the_cpu, monkeypatch, config, steps):
    """Also after decoding on: what is packed then was packed block by block. Value heads are narrower."""
    layer = KIVILayer(config.layer(0))
    prompt, tokens = torch.randn(2, 2, 50, 64), torch.randn(2, 2, steps, 64)
    layer.update(prompt, prompt[..., :48])
    for i in range(steps - 1):
        layer.update(tokens[:, :, i : i + 1], tokens[:, :, i : i + 1, :48])
    last = tokens[:, :, -1:]
    dense = [torch.cat([layer.keys, last], 2).double(), torch.cat([layer.values, last[..., :48]], 2).double()]
    keys, values = layer.update(last, last[..., :48])
    query = torch.randn(2, 4, 1, 64)
    monkeypatch.setattr(PackedStates, "dense", lambda self: pytest.fail("went dense"))
    output = scaled_dot_product_attention(query, repeat_kv(keys, 2), repeat_kv(values, 2))
    expected = scaled_dot_product_attention(query.double(), *(repeat_kv(x, 2) for x in dense))
    assert (output - expected).norm() / expected.norm() < 1e-4


def test_gradients_take_the_dense_path(fused_on_the_cpu):
    layer = KIVILayer(KIVIConfig(nbits=4, **SMALL).layer(0))
    states = torch.randn(1, 2, 60, 64)
    layer.update(states, states)
    token = torch.randn(1, 2, 1, 64, requires_grad=True)
    keys, _ = layer.update(token, token)
    assert type(keys) is torch.Tensor and keys.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sdpa", "kivi"])
@pytest.mark.parametrize("padding", [0, 30], ids=["", "left_padded"])
def test_decode_on_a_gpu_is_the_dense_path_within_rounding(monkeypatch, dtype, name, padding):
    """Teacher forcing: the same tokens through both paths, logits compared step by step."""
    model = copy.deepcopy(tiny_llama(layers=2, heads=8, kv_heads=2, head_dim=128)).to("cuda", dtype)
    model.set_attn_implementation(name)
    inputs = {key: value.cuda() for key, value in prompt(tokens=700, padding=padding).items()}

    def logits(cache):
        mask = inputs["attention_mask"]
        with torch.no_grad():
            model(inputs["input_ids"][:, :600], attention_mask=mask[:, :600], past_key_values=cache)
            return torch.cat([
                model(inputs["input_ids"][:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits
                for i in range(600, 700)
            ]).float()  # fmt: skip

    cache = KIVICache(KIVIConfig(nbits=2))
    fused = logits(cache)
    assert cache.explain() == {0: "packed", 1: "packed"}
    monkeypatch.setattr(attention, "FUSED_DEVICES", [])
    dense = logits(KIVICache(KIVIConfig(nbits=2)))
    # Random weights amplify rounding, and a code that turns over is a step of 2 bits: the kernel's own error is held
    # far tighter in its own tests.
    assert (fused - dense).norm() / dense.norm() < (0.08 if dtype == torch.float16 else 0.2)


def test_queries_that_the_fused_attention_does_not_serve(fused_on_the_cpu):
    """They are served all the same, or refused, as ``scaled_dot_product_attention`` does with dense tensors."""
    (keys, values), (dense_keys, dense_values) = packed()
    query, weights = torch.randn(2, 4, 3, 64), torch.nn.Parameter(torch.zeros(4))

    def reasons(query=query, mask=None, s_aux=None):
        return attention.query_reasons(query, keys, values, mask, None, s_aux)

    assert not reasons() and not reasons(mask=torch.ones(1, 1, 1, 45, dtype=torch.bool))
    assert "mask" in reasons(mask=torch.ones(3, 1, 3, 45, dtype=torch.bool))[0]
    assert "mask" in reasons(mask=torch.ones(2, 1, 5, 45, dtype=torch.bool))[0]
    assert "sequences" in reasons(query[:1])[0]
    assert "backward" in reasons(s_aux=weights)[0]
    one = scaled_dot_product_attention(query[:1], keys, values, enable_gqa=True)
    assert torch.allclose(
        one, scaled_dot_product_attention(query[:1], dense_keys, dense_values, enable_gqa=True), atol=1e-5
    )
    # without a mask, several queries of a causal layer are dealt with as sdpa does
    given, _ = kivi_attention_forward(_Attention(), query, keys, values, None)
    expected, _ = kivi_attention_forward(_Attention(), query, dense_keys, dense_values, None)
    assert torch.allclose(given, expected, atol=1e-5)


def test_a_layer_of_two_dtypes_takes_the_dense_path(fused_on_the_cpu):
    layer = KIVILayer(KIVIConfig(nbits=4, **SMALL).layer(0))
    layer.update(torch.randn(1, 2, 60, 64).half(), torch.randn(1, 2, 60, 64))
    assert layer.dense_reasons() == ["keys are torch.float16, values are torch.float32"]
