"""KIVILayer, held against a reference that keeps dense fake-quantized tensors."""

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kivicache import KIVIConfig
from kivicache.backends.native import NativeBackend
from kivicache.fixed import FixedKIVILayer
from kivicache.layer import KIVILayer
from kivicache.packed import PackedTokens
from kivicache.states import KIVIStates
from tests.reference import ReferenceLayer, fake_quantize, rotate

SMALL = {"group_size": 8, "residual_length": 16, "sink_length": 3}
CONFIGS = {
    "K2V2": KIVIConfig(nbits=2, **SMALL),
    "K4V2": KIVIConfig(nbits_key=4, nbits_value=2, **SMALL),
    "K8V8": KIVIConfig(nbits=8, **SMALL),
    "K16V4": KIVIConfig(nbits_key=16, nbits_value=4, **SMALL),
    "K16V16": KIVIConfig(nbits=16, **SMALL),
    "no_sinks_no_residual": KIVIConfig(nbits=4, group_size=8, residual_length=0, sink_length=0),
    "values_per_channel": KIVIConfig(nbits=4, axis_value="channel", axis_key="token", **SMALL),
    "per_token": KIVIConfig(nbits=4, group_size=-1, residual_length=16, sink_length=3),
    "paper": KIVIConfig(nbits=2, group_size=8, residual_length=16, sink_length=0, policy="paper"),
    "paper_with_sinks": KIVIConfig(nbits=4, policy="paper", **SMALL),
    "mixed_heads": KIVIConfig(nbits=4, heads={0: {0: 8, 2: {"nbits_key": 2, "nbits_value": 16}}}, **SMALL),
}
both_kinds = pytest.mark.parametrize(
    "kind", [KIVILayer, lambda config: FixedKIVILayer(config, 100)], ids=["growing", "fixed"]
)
both_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def states(tokens, batch=2, heads=3, head_dim=20):
    return torch.randn(batch, heads, tokens, head_dim) * 3 + torch.randn(head_dim)


def pair(config):
    return KIVILayer(config.layer(0)), ReferenceLayer(config.layer(0))


def assert_same(layer, reference):
    assert layer.get_seq_length() == reference.get_seq_length()
    if layer.get_seq_length():
        assert torch.equal(layer.keys, reference.keys)
        assert torch.equal(layer.values, reference.values)


def update_both(layer, reference, tokens, batch=2):
    keys, values = states(tokens, batch), states(tokens, batch, head_dim=36)
    promised = layer.get_mask_sizes(tokens)
    seen, expected = layer.update(keys, values), reference.update(keys, values)
    assert promised == (seen[0].shape[2], 0)
    assert torch.equal(seen[0], expected[0]) and torch.equal(seen[1], expected[1])
    assert_same(layer, reference)


@both_configs
def test_prompts_of_every_length_then_decode(config):
    for prompt in range(60):
        layer, reference = pair(config)
        update_both(layer, reference, prompt)
        for _ in range(12):
            update_both(layer, reference, 1)


@both_configs
def test_long_decode(config):
    layer, reference = pair(config)
    for _ in range(150):
        update_both(layer, reference, 1)


@both_configs
def test_updates_of_mixed_length(config):
    layer, reference = pair(config)
    for tokens in (5, 40, 1, 1, 17, 700, 2, 0, 33, 1, 8):
        update_both(layer, reference, tokens)


@both_configs
def test_crop_to_every_length(config):
    layer, reference = pair(config)
    update_both(layer, reference, 60)
    for removed in range(62):
        cropped, expected = copy.deepcopy(layer), copy.deepcopy(reference)
        whole = cropped.keys
        cropped.crop(-removed)
        expected.crop(-removed)
        assert torch.equal(cropped.keys, whole[:, :, : max(60 - removed, 0)])
        assert_same(cropped, expected)
        update_both(cropped, expected, 30)
        update_both(cropped, expected, 1)


operations = st.one_of(
    st.tuples(st.just("update"), st.one_of(st.just(1), st.integers(1, 40))),
    st.tuples(st.just("crop"), st.one_of(st.integers(0, 4), st.integers(0, 50))),
    st.tuples(st.just("reorder"), st.integers(0, 2**16)),
    st.tuples(st.just("repeat"), st.integers(2, 2)),
    st.tuples(st.just("select"), st.integers(0, 2**16)),
    st.tuples(st.just("shorten"), st.integers(0, 60)),
    st.tuples(st.sampled_from(["reset", "deepcopy", "pickle", "offload"]), st.none()),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(CONFIGS)), prompt=st.integers(1, 80), steps=st.lists(operations, max_size=25))
def test_random_sequences_of_operations_equal_the_dense_reference(name, prompt, steps):
    layer, reference = pair(CONFIGS[name])
    batch = 2
    update_both(layer, reference, prompt)
    for operation, argument in steps:
        if operation in ("reorder", "repeat", "select") and layer.get_seq_length() == 0:
            continue  # transformers skips empty layers there, and then they refuse the new batch
        if operation == "update":
            update_both(layer, reference, argument, batch)
        elif operation == "crop":
            layer.crop(-argument)
            reference.crop(-argument)
        elif operation == "reorder":
            order = torch.randint(0, batch, (batch,), generator=torch.Generator().manual_seed(argument))
            layer.reorder_cache(order)
            reference.reorder_cache(order)
        elif operation == "repeat" and batch <= 4:
            layer.batch_repeat_interleave(argument)
            reference.batch_repeat_interleave(argument)
            batch *= argument
        elif operation == "select":
            chosen = torch.randperm(batch, generator=torch.Generator().manual_seed(argument))[: max(batch - 1, 1)]
            layer.batch_select_indices(chosen)
            reference.batch_select_indices(chosen)
            batch = len(chosen)
        elif operation == "shorten" and layer.is_initialized:
            keep = min(argument, layer.get_seq_length())
            layer.keys = layer.keys[:, :, :keep]
            layer.values = layer.values[:, :, :keep]
            reference.crop(keep - reference.get_seq_length())
        elif operation == "reset":
            layer.reset()
            reference.reset()
            assert layer.get_seq_length() == 0 and layer.keys is None and not layer.is_initialized
            batch = 2
        elif operation == "deepcopy":
            layer = copy.deepcopy(layer)
        elif operation == "pickle":
            layer = pickle.loads(pickle.dumps(layer))
        elif operation == "offload":
            layer.offload()
            layer.prefetch()
        assert_same(layer, reference)


@both_configs
def test_stored_bytes_never_change_while_tokens_are_added(config):
    layer = KIVILayer(config.layer(0))
    layer.update(states(50), states(50))

    def stored():
        stores = [store for side in layer._states() for _, store in side.packed if isinstance(store, PackedTokens)]
        return [buffer.read() for store in stores for buffer in store.buffers]

    for tokens in [1] * 40 + [23, 1, 600]:
        before = [content.clone() for content in stored()]
        layer.update(states(tokens), states(tokens))
        for old, new in zip(before, stored(), strict=True):
            assert torch.equal(new[:, :, : old.shape[2]], old)


def test_packing_costs_the_block_not_the_sequence(monkeypatch):
    """Count the tokens that are ever quantized: each exactly once, however long the cache gets."""
    quantized = []
    quantize = NativeBackend.quantize
    token_nbytes = states(1).float().nbytes
    monkeypatch.setattr("kivicache.packed.CHUNK_NBYTES", 400 * token_nbytes)
    monkeypatch.setattr(
        NativeBackend, "quantize", lambda s, x, *rest: (quantized.append(x.shape[2]), quantize(s, x, *rest))[1]
    )
    layer = KIVILayer(KIVIConfig(nbits=2).layer(0))
    layer.update(states(1500), states(1500))
    assert 32 < max(quantized) <= 400  # the prompt in chunks, not at once
    for _ in range(200):
        layer.update(states(1), states(1))
    assert sum(quantized) == 2 * layer._keys.packed_length == 2 * (1700 - 160 - (1700 - 160) % 32)
    assert quantized.count(32) > 8


def test_a_deep_copy_is_independent():
    layer = KIVILayer(CONFIGS["K2V2"].layer(0))
    layer.update(states(51), states(51))
    keys = layer.keys
    other = copy.deepcopy(layer)
    other.update(states(40), states(40))
    other.crop(-70)
    layer.update(states(1), states(1))
    assert torch.equal(layer.keys[:, :, :51], keys) and other.get_seq_length() == 21


def test_assigning_new_content():
    layer = KIVILayer(CONFIGS["K4V2"].layer(0))
    layer.update(states(70), states(70, head_dim=36))
    keys, values = states(50), states(50, head_dim=36)
    layer.keys = keys  # as kvpress does: keys first, lengths disagree for a moment
    with pytest.raises(ValueError, match="keys hold 50 tokens, values 70"):
        layer.update(states(1), states(1, head_dim=36))
    layer.values = values
    fresh = KIVILayer(CONFIGS["K4V2"].layer(0))
    fresh.update(keys, values)
    assert torch.equal(layer.keys, fresh.keys) and torch.equal(layer.values, fresh.values)
    assert layer.get_seq_length() == 50 and layer.memory() == fresh.memory()


def test_assigning_to_an_empty_layer():
    layer = KIVILayer(CONFIGS["K16V16"].layer(0))
    keys, values = states(40), states(40)
    layer.keys, layer.values = keys, values
    assert layer.is_initialized and layer.get_seq_length() == 40
    assert torch.equal(layer.update(states(1), states(1))[0][:, :, :40], keys)


def test_forgetting_an_answer_by_assignment_leaves_the_context_as_it_was():
    layer = KIVILayer(CONFIGS["K2V2"].layer(0))
    layer.update(states(53), states(53))
    context = copy.deepcopy(layer)
    for _ in range(3):
        layer.update(states(1), states(1))
    layer.keys, layer.values = layer.keys[:, :, :53], layer.values[:, :, :53]
    question = states(5), states(5)
    for _ in range(30):
        for seen, expected in zip(layer.update(*question), context.update(*question), strict=True):
            assert torch.equal(seen, expected)


@pytest.mark.parametrize("nbits", [2, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_rotation_reads_back_as_quantizing_the_rotated_tokens(nbits, head_dim):
    config = KIVIConfig(nbits=nbits, rotation="hadamard", **SMALL).layer(0)
    layer = KIVILayer(config)
    keys, values = states(51, head_dim=head_dim), states(51, head_dim=head_dim)
    layer.update(keys, values)
    packed = slice(3, 3 + 32)
    for read, exact, axis in ((layer.keys, keys, "channel"), (layer.values, values, "token")):
        expected = rotate(fake_quantize(rotate(exact[:, :, packed]).float(), nbits, 8, axis))
        error = (read[:, :, packed] - expected).norm() / expected.norm()
        # a rotated value within rounding of the middle between two codes may take either
        assert error < 0.1 / (2**nbits - 1)
        assert torch.equal(read[:, :, :3], exact[:, :, :3]) and torch.equal(read[:, :, 35:], exact[:, :, 35:])


def test_rotation_spreads_an_outlier_channel():
    keys = torch.randn(1, 1, 64, 64)
    keys[..., 5] *= 50
    errors = {}
    for rotation in (None, "hadamard"):
        layer = KIVILayer(
            KIVIConfig(nbits=2, group_size=-1, residual_length=0, sink_length=0, rotation=rotation).layer(0)
        )
        layer.update(keys, keys)
        errors[rotation] = (layer.keys - keys).norm()
    assert errors["hadamard"] < 0.8 * errors[None]


REFUSED_STATES = {
    "batch": ((states(1, batch=3), states(1, batch=3)), "key_states.*\\[3, 3, 1, 20\\].*\\[2, 3, new_tokens, 20\\]"),
    "heads": ((states(1, heads=2), states(1)), "key_states"),
    "value_width": ((states(1), states(1, head_dim=36)), "value_states"),
    "lengths": ((states(1), states(2)), "value_states: got 2 tokens; allowed: 1"),
    "sequences": ((states(1), states(1, batch=1)), "value_states: got 1 sequences; allowed: 2"),
    "dtype": ((states(1).half(), states(1)), "key_states: got torch.float16; allowed: torch.float32"),
    "device": ((states(1).to("meta"), states(1)), "key_states: got meta; allowed: cpu"),
    "dimensions": ((states(1)[0], states(1)), "key_states.*floating tensor \\[batch"),
    "integers": ((states(1).int(), states(1)), "key_states: got torch.int32"),
    "nothing": ((None, None), "key_states: got NoneType; allowed: a tensor"),
    "no_values": ((states(1), None), "value_states: got NoneType; allowed: a tensor"),
}


@both_kinds
@pytest.mark.parametrize(("new", "message"), REFUSED_STATES.values(), ids=REFUSED_STATES)
def test_a_refused_update_leaves_the_cache_as_it_was(kind, new, message):
    layer = kind(CONFIGS["K4V2"].layer(0))
    layer.update(states(50), states(50))
    keys, values, memory = layer.keys, layer.values, layer.memory()
    with pytest.raises(ValueError, match=message):
        layer.update(*new)
    with pytest.raises(ValueError, match="tokens_to_remove: got 7"):
        layer.crop(7)
    with pytest.raises(ValueError, match="keys: got" if type(layer) is KIVILayer else "keys: a KIVICache.*cannot be"):
        layer.keys = torch.zeros(3)
    assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values) and layer.memory() == memory
    layer.update(states(1), states(1))


def test_a_refused_first_update_leaves_the_layer_empty():
    layer = KIVILayer(CONFIGS["K4V2"].layer(0))
    with pytest.raises(ValueError, match="value_states: got 4 tokens; allowed: 5"):
        layer.update(states(5), states(4))
    assert not layer.is_initialized
    layer.update(states(5, batch=1), states(5, batch=1))


@pytest.mark.parametrize("failing", range(4))
def test_an_update_that_fails_midway_loses_nothing(monkeypatch, failing):
    """Out of memory while packing: at whichever call it comes, the layer is as before and goes on."""
    layer, reference = pair(CONFIGS["K4V2"])
    update_both(layer, reference, 58)
    calls = iter(range(100))
    append = PackedTokens.append

    def failing_append(store, new):
        append(store, new)  # even after the codes were written
        if next(calls) == failing:
            raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(PackedTokens, "append", failing_append)
        with pytest.raises(torch.OutOfMemoryError):
            layer.update(states(600), states(600, head_dim=36))
    assert_same(layer, reference)
    for tokens in (1, 20, 1):
        update_both(layer, reference, tokens)


@both_kinds
def test_a_crop_by_a_tensor_is_one_by_its_number(kind):
    layer, expected = (kind(CONFIGS["K4V2"].layer(0)) for _ in range(2))
    prompt, step = (states(70), states(70)), (states(1), states(1))
    for each, removed in ((layer, torch.tensor(-13)), (expected, -13)):
        each.update(*prompt)
        each.crop(removed)
        each.update(*step)
    assert torch.equal(layer.keys, expected.keys)
    assert repr(layer.memory()) == repr(expected.memory())  # numbers of the host, not tensors
    assert layer.get_seq_length() == 58


@pytest.mark.parametrize("given", [3, -1.5, None, "2", torch.tensor(-2.5), torch.tensor(3), torch.tensor([-1, -2])])
def test_a_refused_crop(given):
    layer = KIVILayer(CONFIGS["K4V2"].layer(0))
    layer.update(states(20), states(20))
    with pytest.raises(ValueError, match=r"tokens_to_remove: got .*; allowed"):
        layer.crop(given)
    assert layer.get_seq_length() == 20


@pytest.mark.parametrize("change", ["crop", "reorder_cache", "offload"])
def test_a_change_that_fails_midway_changes_nothing(monkeypatch, change):
    layer = KIVILayer(CONFIGS["K4V2"].layer(0))
    layer.update(states(53), states(53))
    before = layer.keys, layer.values
    calls = {"crop": (-20,), "reorder_cache": (torch.tensor([1, 0]),), "offload": ()}
    method = {"crop": "crop", "reorder_cache": "map_batch", "offload": "to"}[change]
    original, sides = getattr(KIVIStates, method), []

    def fails_for_the_values(states, *args, **kwargs):
        original(states, *args, **kwargs)
        sides.append(states)
        if len(sides) == 2:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(KIVIStates, method, fails_for_the_values)
    with pytest.raises(torch.OutOfMemoryError):
        getattr(layer, change)(*calls[change])
    assert torch.equal(layer.keys, before[0]) and torch.equal(layer.values, before[1])


def test_after_a_first_update_that_fails_any_other_shape_fits(monkeypatch):
    layer = KIVILayer(CONFIGS["K4V2"].layer(0))
    with monkeypatch.context() as patched:
        patched.setattr(KIVIStates, "append", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
        with pytest.raises(torch.OutOfMemoryError):
            layer.update(*torch.randn(2, 4, 2, 50, 16))
    states = torch.randn(2, 1, 3, 20, 16, dtype=torch.float16)
    layer.update(*states)
    assert torch.equal(layer.keys[:, :, -8:], states[0][:, :, -8:]) and layer.dtype == torch.float16


def test_what_an_update_returned_outlives_an_assignment(monkeypatch):
    monkeypatch.setattr("kivicache.attention.FUSED_DEVICES", ["cpu", "cuda"])
    pytest.importorskip("triton")
    layer = KIVILayer(KIVIConfig(nbits=4, residual_length=8, sink_length=4).layer(0))
    layer.update(*torch.randn(2, 1, 2, 80, 16))
    seen, _ = layer.update(*torch.randn(2, 1, 2, 1, 16))
    expected = layer.keys.clone()
    layer.keys, layer.values = layer.keys[:, :, :50], layer.values[:, :, :50]
    assert torch.equal(seen.dense(), expected) and layer.get_seq_length() == 50


def test_a_shorter_assignment_crops_also_beside_a_nan():
    key_states = states(80)
    key_states[0, 0, 12, 3] = torch.nan
    layer = KIVILayer(CONFIGS["K2V2"].layer(0))
    layer.update(key_states, states(80))
    codes = layer._keys.packed[0][1].codes.data_ptr()
    layer.keys = layer.keys[:, :, :77]
    assert layer._keys.packed[0][1].codes.data_ptr() == codes  # not quantized again


def test_a_layer_whose_content_was_taken_away_is_as_new():
    layer = KIVILayer(CONFIGS["K4V2"].layer(0))
    layer.update(states(50), states(50))
    layer.keys = None
    with pytest.raises(ValueError, match="keys hold 0 tokens, values 50: assign both"):
        layer.update(states(1), states(1))
    layer.values = None
    layer.update(states(3, batch=1, head_dim=8), states(3, batch=1, head_dim=8))
    assert layer.get_seq_length() == 3


def test_what_is_no_tensor_is_not_assigned():
    with pytest.raises(ValueError, match="keys: got str; allowed: a tensor"):
        KIVILayer(CONFIGS["K4V2"].layer(0)).keys = "a"


def test_a_head_that_is_not_there_is_refused():
    layer = KIVILayer(KIVIConfig(heads={0: {3: 8}}).layer(0))
    with pytest.raises(ValueError, match="heads: got kv head 3; allowed: 0 to 2"):
        layer.update(states(5), states(5))
    assert not layer.is_initialized and layer.get_seq_length() == 0


def test_an_odd_head_dim_cannot_rotate():
    layer = KIVILayer(KIVIConfig(rotation="hadamard").layer(0))
    with pytest.raises(ValueError, match="head_dim 33"):
        layer.update(states(5, head_dim=33), states(5, head_dim=33))
    assert not layer.is_initialized


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_is_kept_and_exact_tokens_are_exact(dtype):
    layer = KIVILayer(KIVIConfig(nbits=2, **SMALL).layer(0))
    keys, values = states(51).to(dtype), states(51).to(dtype)
    layer.update(keys, values)
    seen, _ = layer.update(keys[:, :, :1], values[:, :, :1])
    assert seen.dtype == layer.keys.dtype == layer.dtype == dtype
    assert torch.equal(layer.keys[:, :, :3], keys[:, :, :3]) and torch.equal(layer.keys[:, :, 35:51], keys[:, :, 35:])
    assert not torch.equal(layer.keys[:, :, 3:35], keys[:, :, 3:35])


def test_filled_in_inference_mode_and_used_outside():
    layer = KIVILayer(KIVIConfig(nbits=2, **SMALL).layer(0))
    with torch.inference_mode():
        layer.update(states(50), states(50))
        layer.reorder_cache(torch.tensor([1, 0]))
    for _ in range(20):
        layer.update(states(1), states(1))
    assert layer.get_seq_length() == 70


def test_gradients_of_the_prompt_are_not_dragged_along():
    layer = KIVILayer(KIVIConfig(nbits=2, **SMALL).layer(0))
    keys = states(50).requires_grad_()
    seen, _ = layer.update(keys, states(50))
    assert seen.requires_grad and not layer.keys.requires_grad
