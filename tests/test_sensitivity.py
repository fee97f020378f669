"""The errors of a profile, against the model itself with one layer packed."""

import pytest
import torch

from kivicache import KIVICache, KIVIConfig
from kivicache.fidelity import cache_argument
from kivicache.objectives import CachedKL
from kivicache.sensitivity import Choice, assigned, choices, profile_errors, unpacked
from tests.tiny import VOCAB, tiny_llama

BASE = KIVIConfig(group_size=8, residual_length=8, sink_length=4)
CHOSEN = [Choice(2, 4, 8), Choice(8, 2, 16, "hadamard")]
PREFILL = 60


@pytest.fixture
def fidelity():
    return CachedKL(tiny_llama(layers=3), torch.randint(2, VOCAB, (2, 70)), PREFILL, 20)


def one_layer(layer_idx, choice):
    exact = KIVIConfig.from_dict(BASE.to_dict() | {"nbits_key": 16, "nbits_value": 16})
    return assigned(exact, {(layer_idx, None): choice})


def observed(fidelity, layer_idx, config):
    """Keys, values, probabilities and output of one layer's attention, the model reading ``config``'s cache."""
    model, name = fidelity.model, cache_argument(fidelity.model)
    cache, outputs = KIVICache(config, config=model.config), []
    hook = model.model.layers[layer_idx].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: outputs.append(args[0])
    )
    with torch.no_grad():
        model(fidelity.tokens[:, :PREFILL], **{name: cache})
        keys, values = cache.layers[layer_idx].keys, cache.layers[layer_idx].values
        model(fidelity.tokens[:, PREFILL:-1], **{name: cache})
    hook.remove()
    output = outputs[-1].unflatten(-1, (model.config.num_attention_heads, -1)).transpose(1, 2)
    return keys, values, output


def relative(exact, read):
    """By kv head, of which each has two query heads in the tiny model's outputs."""
    exact, read = (x.unflatten(1, (2, -1)).transpose(0, 1).flatten(1) for x in (exact, read))
    return (exact - read).abs().mean(1) / exact.abs().mean(1)


@pytest.mark.parametrize("per_head", [False, True])
def test_errors_are_those_that_the_model_meets(fidelity, per_head):
    profile = profile_errors(fidelity, BASE, CHOSEN, per_head)
    heads = (0, 1) if per_head else (None,)
    assert list(profile) == [(layer_idx, head) for layer_idx in range(3) for head in heads]
    for (layer_idx, head), costs in profile.items():
        keys, values, output = observed(fidelity, layer_idx, KIVIConfig(nbits=16))
        for choice, cost in costs.items():
            own_keys, own_values, own_output = observed(fidelity, layer_idx, one_layer(layer_idx, choice))
            new = fidelity.tokens.shape[1] - 1 - PREFILL  # exact tokens behind the prompt take part in the means
            expected = {"e_o": relative(output, own_output)}
            for name, exact, read in (("e_k", keys, own_keys), ("e_v", values, own_values)):
                absolute = (exact - read).abs().transpose(0, 1).flatten(1).sum(1)
                whole = observed_magnitude(fidelity, layer_idx, name, new)
                expected[name] = absolute / whole
            for name, of_heads in expected.items():
                value = of_heads.mean() if head is None else of_heads[head]
                assert getattr(cost, name) == pytest.approx(value.item(), rel=2e-3), (layer_idx, head, choice, name)
            assert cost.e_a > 0


def observed_magnitude(fidelity, layer_idx, name, new):
    cache = KIVICache(KIVIConfig(nbits=16), config=fidelity.model.config)
    with torch.no_grad():
        fidelity.model(fidelity.tokens[:, : PREFILL + new], **{cache_argument(fidelity.model): cache})
    layer = cache.layers[layer_idx]
    states = layer.keys if name == "e_k" else layer.values
    return states.abs().transpose(0, 1).flatten(1).sum(1)


def test_probabilities_are_those_of_eager_attention(fidelity):
    eager = tiny_llama(layers=3, attention="eager")
    own = CachedKL(eager, fidelity.tokens, PREFILL, 20)
    probabilities = []
    for config in (KIVIConfig(nbits=16), one_layer(0, CHOSEN[0])):
        with torch.no_grad():
            name = cache_argument(eager)
            output = eager(fidelity.tokens[:, PREFILL:-1], **{name: own.cache(config)}, output_attentions=True)
        probabilities.append(output.attentions[0])
    expected = (probabilities[0] - probabilities[1]).abs().mean()
    assert profile_errors(fidelity, BASE, CHOSEN)[0, None][CHOSEN[0]].e_a == pytest.approx(expected.item(), rel=2e-3)


def test_bits_are_true_bits_and_more_bits_cost_less_error(fidelity):
    costs = profile_errors(fidelity, BASE, choices([8], [None]))[1, None]
    for choice, cost in costs.items():
        assert cost.bits == (choice.nbits_key + choice.nbits_value) / 2 + 32 / 8
        assert cost.values == 2 * 2 * 2 * 16 * PREFILL  # keys and values, sequences, kv heads, head_dim
    assert costs[Choice(2, 2, 8)].e_k > costs[Choice(4, 2, 8)].e_k > costs[Choice(8, 2, 8)].e_k
    assert costs[Choice(2, 2, 8)].e_k == costs[Choice(2, 8, 8)].e_k


def test_the_model_attends_as_before(fidelity):
    model, tokens = fidelity.model, fidelity.tokens
    before = model(tokens).logits
    profile_errors(fidelity, BASE, CHOSEN[:1])
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(tokens).logits, before)


def test_assigned_sets_layers_and_heads():
    base = KIVIConfig(backend="mse", layers={0: {"rotation": "hadamard"}}, heads={0: {1: 8}, 2: {0: 8}})
    config = assigned(base, {(0, None): Choice(2, 8, 64), (1, 1): Choice(8, 4), (2, 1): Choice(2, 2)})
    first, second, third = map(config.layer, range(3))
    assert (first.nbits_key, first.nbits_value, first.group_size, first.rotation, first.heads) == (2, 8, 64, None, {})
    assert (second.heads, second.group_size) == ({1: (8, 4)}, 32)
    assert third.heads == {0: (8, 8), 1: (2, 2)}
    assert {config.layer(i).backend for i in range(3)} == {"mse"}


def test_a_choice_that_names_no_group_size_keeps_the_layers_own():
    base = KIVIConfig(layers={0: {"group_size": 64, "rotation": "hadamard"}})
    layer = assigned(base, {(0, None): Choice(8, 8)}).layer(0)
    assert (layer.nbits_key, layer.group_size, layer.rotation) == (8, 64, "hadamard")


def test_unpacked_leaves_only_what_a_unit_is_given():
    base = assigned(BASE, {(0, None): Choice(2, 2, 16, "hadamard"), (1, 0): Choice(2, 2)})
    config = assigned(unpacked(base), {(0, 1): Choice(4, 2)})
    assert config.layer(0).heads == {1: (4, 2)} and config.layer(1).heads == {}
    assert all((layer.nbits_key, layer.nbits_value) == (16, 16) for layer in map(config.layer, range(3)))
    assert (config.layer(0).group_size, config.layer(0).rotation) == (16, "hadamard")


def test_choices_are_every_combination():
    assert len(set(choices([32, 64], [None, "hadamard"]))) == 36
    assert {str(choice) for choice in choices([64], ["hadamard"], nbits=[2, 8])} == {
        f"K{k}V{v} g64 hadamard" for k in (2, 8) for v in (2, 8)
    }
    assert str(Choice(2, 4)) == "K2V4"


def test_a_model_whose_attention_cannot_be_seen_is_named(fidelity, monkeypatch):
    monkeypatch.setattr(type(fidelity.model), "set_attn_implementation", lambda *_: None)
    with pytest.raises(ValueError, match=r"model: the attention of LlamaForCausalLM's layers \[0, 1, 2\] cannot be"):
        profile_errors(fidelity, BASE, CHOSEN)
