"""The cache of fixed capacity against the growing one: same tokens, same bytes, compiled or not."""

import copy
import pickle
import warnings

import pytest
import torch
from transformers import CompileConfig, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

import kivicache
from kivicache import KIVICache, KIVIConfig
from kivicache.fixed import FixedKIVILayer
from kivicache.fixed_attention import FixedPackedStates
from kivicache.layer import KIVILayer
from tests.test_generate import WAYS, draft_of
from tests.tiny import prompt, tiny_llama

SMALL = {"group_size": 8, "residual_length": 16, "sink_length": 3}
CONFIGS = {
    "2_bits": KIVIConfig(nbits=2, **SMALL),
    "8_4_bits": KIVIConfig(nbits_key=8, nbits_value=4, **SMALL),
    "rotated": KIVIConfig(nbits=4, rotation="hadamard", **SMALL),
    "per_token": KIVIConfig(nbits=4, group_size=-1, residual_length=16, sink_length=0),
    "one_side": KIVIConfig(nbits_key=16, nbits_value=2, **SMALL),
    "16_bits": KIVIConfig(nbits=16, **SMALL),
    "heads": KIVIConfig(nbits=2, heads={0: {1: {"nbits_key": 8, "nbits_value": 4}}}, **SMALL),
    "exact_heads": KIVIConfig(nbits=4, heads={0: {0: {"nbits_key": 16, "nbits_value": 2}}}, **SMALL),
    "mse": KIVIConfig(nbits=2, backend="mse", rotation="hadamard", **SMALL),
    "rotated_heads": KIVIConfig(nbits=4, rotation="hadamard", heads={0: {1: 2}}, **SMALL),
}
PACKED = {name: config for name, config in CONFIGS.items() if name != "16_bits"}
CAPACITY = 160


def fixed_cache(config, max_cache_len=CAPACITY, model=None):
    return KIVICache(config, config=(model or tiny_llama()).config, max_cache_len=max_cache_len)


def compiled(backend="eager", **kwargs):
    """What makes ``generate`` compile on the CPU as it does on a GPU, where a graph break is an error."""
    config = CompileConfig(**{"fullgraph": True, "mode": None, "backend": backend, **kwargs})
    config._compile_all_devices = True
    return config


def generate(model, inputs, cache, **kwargs):
    torch.manual_seed(1234)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return model.generate(**inputs, past_key_values=cache, **{"max_new_tokens": 40, "do_sample": False, **kwargs})


@pytest.fixture
def graphs():
    """How many graphs were compiled since."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def count():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    yield count
    torch._dynamo.reset()


def assert_same_content(fixed, growing):
    for layer, expected in zip(fixed.layers, growing.layers, strict=True):
        assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)


@pytest.mark.parametrize("config", PACKED.values(), ids=PACKED)
def test_a_layer_holds_what_a_growing_one_holds(config):
    """Bit by bit, whatever comes in what pieces: prompt, steps, drafts, chunks, and crops into the packed part."""
    growing, fixed = KIVILayer(config.layer(0)), FixedKIVILayer(config.layer(0), 400)
    generator = torch.Generator().manual_seed(torch.initial_seed())
    new = [50, *[1] * 20, 5, 16, 17, 3, -2, 1, 60, -45, *[1] * 30, -30, 4, 16, 16, 16, *[2] * 20]
    for step, tokens in enumerate(new):
        if tokens < 0:
            growing.crop(tokens)
            fixed.crop(tokens)
        else:
            states = torch.randn(2, 2, 3, tokens, 16, generator=generator)
            length = growing.get_seq_length() + tokens
            expected, seen = growing.update(*states), fixed.update(*states)
            assert fixed.get_seq_length() == length
            for dense, expected_dense in zip(seen, expected, strict=True):
                assert torch.equal(dense[:, :, :length], expected_dense), (step, tokens)
                assert step == 0 or (dense.shape[2] == 400 and not dense[:, :, length:].any())
        if step % 7 == 3:
            assert torch.equal(fixed.keys, growing.keys) and torch.equal(fixed.values, growing.values), (step, tokens)
    report, expected_report = fixed.memory(), growing.memory()
    assert (report.codes, report.scales, report.values) == (
        expected_report.codes,
        expected_report.scales,
        expected_report.values,
    )


def regret(model, inputs, output, growing):
    """How much worse the tokens of `output` are than the choices of a `growing` cache fed with them.

    The compiler rounds elsewhere than eager mode does, which now and then turns a code over and decides a tie: each
    token must be the growing cache's choice, or nearly as good. Returns the mean difference of logits, in standard
    deviations: 0.01 where a code was turned over, 0.2 and more for a cache with one exact token more.
    """
    prompt_length, length = inputs["input_ids"].shape[1], output.shape[1]
    mask = torch.ones_like(output)
    mask[:, :prompt_length] = inputs["attention_mask"]
    positions, logits = (mask.cumsum(1) - 1).clamp(min=0), []
    for start, stop in [(0, prompt_length), *((i, i + 1) for i in range(prompt_length, length - 1))]:
        with torch.no_grad():
            step = model(
                output[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=growing,
            )
        logits.append(step.logits[:, -1:])
    logits = torch.cat(logits, dim=1).float()
    chosen = logits.gather(-1, output[:, prompt_length:, None])
    return ((logits.amax(-1, keepdim=True) - chosen) / logits.std(-1, keepdim=True)).mean()


COMPILED = {  # config, tokens of padding, backend
    "aot_eager": ("2_bits", 0, "aot_eager"),
    "8_4_bits_left_padded": ("8_4_bits", 9, "eager"),
    "rotated": ("rotated", 9, "aot_eager"),
    "mse": ("mse", 9, "aot_eager"),
    "per_token": ("per_token", 0, "eager"),
    "one_side": ("one_side", 9, "eager"),
    "16_bits": ("16_bits", 0, "eager"),
    "heads": ("heads", 9, "aot_eager"),
    "exact_heads": ("exact_heads", 0, "eager"),
    "rotated_heads": ("rotated_heads", 9, "eager"),
}


@pytest.mark.parametrize(("name", "padding", "backend"), COMPILED.values(), ids=COMPILED)
def test_compiled_generation_is_the_growing_cache_s(name, padding, backend, graphs):
    model, inputs, config = tiny_llama(layers=1), prompt(padding=padding), CONFIGS[name]
    growing, fixed = KIVICache(config), fixed_cache(config, model=model)
    expected = generate(model, inputs, growing)
    assert torch.equal(generate(model, inputs, fixed, compile_config=compiled(backend)), expected)
    assert graphs() == 1
    length = growing.get_seq_length()
    for side in ("keys", "values"):
        states = getattr(fixed.layers[0], side)[:, :, :length]
        assert torch.allclose(states, getattr(growing.layers[0], side), atol=1e-5)


@pytest.mark.parametrize("name", ["2_bits", "heads", "mse"])
def test_generation_compiled_by_inductor(name, graphs):
    model, inputs, config = tiny_llama(layers=1), prompt(padding=9), CONFIGS[name]
    fixed = fixed_cache(config, model=model)
    output = generate(model, inputs, fixed, compile_config=compiled("inductor", mode="reduce-overhead"))
    assert regret(model, inputs, output, KIVICache(config)) < 0.05
    assert graphs() == 1


@pytest.mark.parametrize("way", [way for way in WAYS if "sampl" not in way or way == "sampling"])
def test_way_of_generating(way):
    """Every way, the steps not compiled: so are they in the growing cache, and scores differ by rounding alone."""
    model, kwargs, config = tiny_llama(), dict(WAYS[way]), CONFIGS["2_bits"]
    inputs = prompt(kwargs.pop("batch", 2), padding=9)
    if kwargs.pop("repeat", False):
        inputs["input_ids"][:, 40:] = inputs["input_ids"][:, 10:40]
    if kwargs.pop("assistant", False):
        kwargs["assistant_model"] = draft_of(model)
    growing, fixed = KIVICache(config), fixed_cache(config)
    expected = generate(model, inputs, growing, **kwargs)
    assert torch.equal(generate(model, inputs, fixed, **kwargs), expected)
    assert [layer.keys.shape for layer in fixed.layers] == [layer.keys.shape for layer in growing.layers]
    assert torch.equal(fixed.layers[0].keys, growing.layers[0].keys)


@pytest.mark.parametrize("way", ["assisted", "prompt_lookup"])
def test_drafts_of_several_lengths_compiled(way, graphs):
    model, kwargs, config = tiny_llama(), dict(WAYS[way]), CONFIGS["2_bits"]
    inputs = prompt(kwargs.pop("batch", 2))
    if kwargs.pop("repeat", False):
        inputs["input_ids"][:, 40:] = inputs["input_ids"][:, 10:40]
    if kwargs.pop("assistant", False):
        kwargs["assistant_model"] = draft_of(model)
        kwargs["assistant_model"].generation_config.num_assistant_tokens = 6
    growing, fixed = KIVICache(config), fixed_cache(config)
    expected = generate(model, inputs, growing, **kwargs)
    assert torch.equal(generate(model, inputs, fixed, compile_config=compiled(), **kwargs), expected)
    assert torch.equal(fixed.layers[0].keys, growing.layers[0].keys)


def test_chunked_prefill_compiles_around_its_chunks():
    torch._dynamo.reset()
    model, inputs, config = tiny_llama(layers=1), prompt(), CONFIGS["2_bits"]
    expected = generate(model, inputs, KIVICache(config), prefill_chunk_size=33)
    compile_config = compiled(fullgraph=False)  # a chunk longer than a step is cached outside
    output = generate(
        model, inputs, fixed_cache(config, model=model), prefill_chunk_size=33, compile_config=compile_config
    )
    assert torch.equal(output, expected)


def test_reset_and_fresh_caches_and_other_batches_reuse_the_graph(graphs):
    model, config = tiny_llama(layers=1), CONFIGS["2_bits"]
    cache = fixed_cache(config, model=model)
    address = None
    for batch, padding, fresh in ((2, 0, False), (2, 9, False), (2, 3, True)):
        inputs = prompt(batch, padding=padding)
        cache = fixed_cache(config, model=model) if fresh else cache
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.layers[0].keys is None
        expected = generate(model, inputs, KIVICache(config))
        assert torch.equal(generate(model, inputs, cache, compile_config=compiled()), expected)
        assert graphs() == 1
        found = cache.layers[0]._stores[0].packed[0].codes.data_ptr()
        address = address or found
        assert fresh or found == address  # a captured graph would write there
    cache.reset()
    inputs = prompt(3)
    assert torch.equal(
        generate(model, inputs, cache, compile_config=compiled()), generate(model, inputs, KIVICache(config))
    )


def test_several_turns_on_one_cache():
    model = copy.deepcopy(tiny_llama()).double()  # in float32 a tie within its rounding would come up now and then
    caches = KIVICache(CONFIGS["2_bits"]), fixed_cache(CONFIGS["2_bits"], 400)
    history = prompt()["input_ids"]
    for question in (0, 11, 45, 1):
        history = torch.cat([history, prompt(tokens=question)["input_ids"]], dim=1)
        inputs = {"input_ids": history, "attention_mask": torch.ones_like(history)}
        output, expected = (generate(model, inputs, cache) for cache in caches)
        assert torch.equal(output, expected)
        history = output


def test_a_copy_is_independent():
    model, cache = tiny_llama(), fixed_cache(CONFIGS["2_bits"])
    generate(model, prompt(), cache)
    before, copied = cache.layers[1].keys, copy.deepcopy(cache)
    states = torch.randn(2, 2, 1, 16)
    for _ in range(12):
        copied.update(states, states, 1)
    assert torch.equal(cache.layers[1].keys, before)
    assert copied.get_seq_length(1) == cache.get_seq_length(1) + 12


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_made_in_inference_mode_goes_on_outside(duplicate):
    layer = FixedKIVILayer(CONFIGS["2_bits"].layer(0), 100)
    prompt_states, token = torch.randn(2, 1, 3, 40, 16), torch.randn(2, 1, 3, 1, 16)
    layer.update(*prompt_states)
    with torch.inference_mode():
        other = duplicate(layer)
    for _ in range(20):
        layer.update(*token)
        other.update(*token)
    assert torch.equal(other.keys, layer.keys) and torch.equal(other.values, layer.values)


def test_a_gradient_passes_through_a_step():
    layer = FixedKIVILayer(CONFIGS["2_bits"].layer(0), 100)
    layer.update(torch.randn(1, 3, 40, 16), torch.randn(1, 3, 40, 16))
    token = torch.randn(1, 3, 1, 16, requires_grad=True)
    keys, values = layer.update(token, token)
    (keys.sum() + values.sum()).backward()
    assert torch.equal(token.grad, torch.full_like(token, 2.0)) and layer.get_seq_length() == 41


def test_content_is_not_assigned():
    layer = FixedKIVILayer(CONFIGS["2_bits"].layer(0), 100)
    layer.update(torch.randn(1, 3, 40, 16), torch.randn(1, 3, 40, 16))
    for states in (None, torch.randn(1, 3, 8, 16)):
        with pytest.raises(ValueError, match="keys: a KIVICache"):
            layer.keys = states
    assert layer.get_seq_length() == 40


def test_a_step_under_torch_compile_itself():
    """The model compiled by hand: one graph, no break, nothing compiled again."""
    torch._dynamo.reset()
    model, config = tiny_llama(), CONFIGS["2_bits"]
    growing, fixed = KIVICache(config), fixed_cache(config, 140)
    tokens = prompt(tokens=100)["input_ids"]
    step, errors = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    with torch.no_grad():
        for cache in (growing, fixed):
            model(tokens[:, :60], past_key_values=cache)
        for i in range(60, 100):
            inputs = tokens[:, i : i + 1]
            expected = model(inputs, past_key_values=growing).logits
            with torch._dynamo.config.patch(error_on_recompile=i > 60):
                logits = step(input_ids=inputs, past_key_values=fixed).logits
            errors.append((logits - expected).norm() / expected.norm())
    assert sum(errors) / len(errors) < 1e-2  # 2e-5 where rounding turns a code over, 0.6 with one exact token more
    assert torch.equal(fixed.layers[0].keys, growing.layers[0].keys)
    torch._dynamo.reset()


@pytest.mark.parametrize("compile_config", [None, compiled()], ids=["eager", "compiled"])
def test_what_does_not_fit_is_refused_before_it_is_written(compile_config):
    model, inputs = tiny_llama(), prompt()
    cache = fixed_cache(CONFIGS["2_bits"], 80)
    with pytest.raises(ValueError, match="max_cache_len: got 80, and 1 new tokens after 80 cached ones"):
        generate(model, inputs, cache, max_new_tokens=30, compile_config=compile_config)
    assert cache.get_seq_length() == 80
    before = [layer.keys for layer in cache.layers]
    with pytest.raises(ValueError, match="max_cache_len"):
        cache.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), 0)
    with pytest.raises(ValueError, match="max_cache_len"):
        cache.update(torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16), 0)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    generate(model, inputs, fixed_cache(CONFIGS["2_bits"], 80), max_new_tokens=11, compile_config=compile_config)
    with pytest.raises(ValueError, match="max_cache_len: got 60, and 70 new tokens after 0"):
        generate(model, inputs, fixed_cache(CONFIGS["2_bits"], 60), compile_config=compile_config)


def test_a_step_on_a_full_cache_writes_nothing_and_is_told():
    """Only a graph that nobody asks can come so far."""
    layer = FixedKIVILayer(CONFIGS["2_bits"].layer(0), 50)
    layer.update(*torch.randn(2, 1, 2, 49, 16))
    before = layer.keys
    step = torch.compile(lambda states: layer.update(states, states)[0].sum(), fullgraph=True, backend="eager")
    states = torch.randn(1, 2, 2, 16)
    step(states)
    assert layer.get_seq_length() == 49
    with pytest.raises(ValueError, match="1 compiled steps on a full cache"):
        layer.keys  # noqa: B018
    layer.reset()
    layer.update(before, before)
    assert layer.get_seq_length() == 49


def test_a_first_step_that_fails_leaves_an_empty_layer_empty(monkeypatch):
    layer = FixedKIVILayer(CONFIGS["2_bits"].layer(0), 64)
    layer.update(*torch.randn(2, 1, 2, 30, 16))
    layer.reset()
    with monkeypatch.context() as patched:
        patched.setattr("kivicache.fixed.append_step", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
        with pytest.raises(torch.OutOfMemoryError):
            layer.update(*torch.randn(2, 1, 2, 8, 16))
    assert layer.get_seq_length() == 0 and layer.get_mask_sizes(20) == (20, 0)


@pytest.mark.parametrize("indices", [[1, 0], [1, 0, 1]], ids=["same batch", "larger batch"])
@pytest.mark.parametrize("failing", [1, 3, 9])
def test_a_reordering_that_fails_midway_changes_nothing(indices, failing):
    layer = FixedKIVILayer(CONFIGS["2_bits"].layer(0), 64)
    layer.update(*torch.randn(2, 2, 2, 50, 16))
    before, calls = (layer.keys, layer.values), []

    def select(states):
        calls.append(states)
        if len(calls) == failing:
            raise torch.OutOfMemoryError
        return states[indices]

    with pytest.raises(torch.OutOfMemoryError):
        layer._map_batch(select)
    assert torch.equal(layer.keys, before[0]) and torch.equal(layer.values, before[1])
    layer.batch_select_indices(torch.tensor(indices))
    assert torch.equal(layer.keys, before[0][indices]) and torch.equal(layer.values, before[1][indices])


@pytest.mark.parametrize("exact", [("sink_length",), ("residual_length",), ("sink_length", "residual_length")])
def test_what_stays_exact_takes_no_more_room_than_the_capacity(exact):
    config = KIVIConfig(nbits=2, **dict.fromkeys(exact, 10**12))
    growing, fixed = KIVILayer(config.layer(0)), FixedKIVILayer(config.layer(0), 640)
    for tokens in (600, 1, 17, *[1] * 10, 12):
        states = torch.randn(2, 1, 2, tokens, 16)
        length = growing.get_seq_length() + tokens
        for ours, theirs in zip(fixed.update(*states), growing.update(*states), strict=True):
            assert torch.equal(ours[:, :, :length], theirs)
    with pytest.raises(ValueError, match="max_cache_len: got 640"):
        fixed.update(*states)
    assert fixed.memory().total < 1.4 * 2 * 640 * 2 * 2 * 16 * 4  # the bytes of a StaticLayer


def test_a_batch_changes_in_all_layers_or_in_none():
    cache = fixed_cache(KIVIConfig(nbits=4, layers={1: {"nbits": 16}}, **SMALL))
    for layer_idx in range(2):
        cache.update(*torch.randn(2, 3, 2, 20, 16), layer_idx)
    for method, argument in (("batch_select_indices", torch.tensor([0, 2])), ("batch_repeat_interleave", 2)):
        with pytest.raises(ValueError, match=f"{method}: layer 1, a StaticLayer, cannot; no layer was changed"):
            getattr(cache, method)(argument)
    assert [layer.keys.shape[0] for layer in cache.layers] == [3, 3]


def test_a_prompt_that_does_not_fit_allocates_nothing():
    layer = FixedKIVILayer(CONFIGS["2_bits"].layer(0), 64)
    with pytest.raises(ValueError, match="100 new tokens after 0 cached ones"):
        layer.update(*torch.randn(2, 1, 2, 100, 16))
    assert not layer.is_initialized and layer.memory().total == 0
    layer.update(*torch.randn(2, 1, 2, 20, 16))
    with pytest.raises(ValueError, match="60 new tokens after 20 cached ones"):
        layer.update(*torch.randn(2, 1, 2, 60, 16))
    assert layer.get_seq_length() == 20


def test_a_16_bit_layer_in_front_is_refused_as_a_packed_one_is():
    model = tiny_llama(layers=2)
    cache = fixed_cache(KIVIConfig(nbits=2, layers={0: {"nbits": 16}}, **SMALL), 60, model)
    for tokens, fits in ((61, False), (50, True), (11, False), (9, True), (2, False), (1, True), (1, False)):
        before = [int(layer.get_seq_length()) for layer in cache.layers]
        if fits:
            model(torch.randint(90, (1, tokens)), past_key_values=cache)
        else:
            with pytest.raises(ValueError, match="max_cache_len: got 60"):
                model(torch.randint(90, (1, tokens)), past_key_values=cache)
            assert [int(layer.get_seq_length()) for layer in cache.layers] == before
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [60, 60]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "kivi"])
@pytest.mark.parametrize("tokens", [70, 7], ids=["prompt", "step"])
def test_a_prompt_beside_a_16_bit_layer_shares_its_mask(attention, tokens):
    model, inputs = tiny_llama(attention=attention), prompt(tokens=tokens, padding=5)
    config = KIVIConfig(nbits=4, layers={1: {"nbits": 16}}, **SMALL)
    fixed, expected = fixed_cache(config, model=model), generate(model, inputs, KIVICache(config))
    for _ in range(2):  # the second time in buffers that are there
        assert torch.equal(generate(model, inputs, fixed), expected)
        fixed.reset()
    assert fixed.get_mask_sizes(9, 0) == fixed.get_mask_sizes(9, 1) == (CAPACITY, 0)


@pytest.mark.parametrize("given", [5, "x", 0.5])
def test_a_refused_crop(given):
    layer = FixedKIVILayer(CONFIGS["2_bits"].layer(0), 64)
    for _ in range(2):
        with pytest.raises(ValueError, match="tokens_to_remove"):
            layer.crop(given)
        layer.update(*torch.randn(2, 1, 2, 20, 16))


def test_representation():
    model = tiny_llama(layers=1)
    exact = fixed_cache(KIVIConfig(nbits=16), 64, model)
    exact.update(*torch.randn(2, 1, 2, 20, 16), 0)
    assert "; 20 tokens" in repr(exact)
    cache = fixed_cache(CONFIGS["2_bits"], 50, model)
    cache.update(*torch.randn(2, 1, 2, 50, 16), 0)
    step = torch.compile(lambda x: cache.layers[0].update(x, x)[0].sum(), fullgraph=True, backend="eager")
    step(torch.randn(1, 2, 1, 16))
    assert "1 compiled steps on a full cache" in repr(cache)


REFUSED = {
    "without config": (KIVIConfig(), {"max_cache_len": 10}, "max_cache_len: .* config=model.config"),
    "no number": (
        KIVIConfig(nbits=16),
        {"max_cache_len": 9.0, "config": tiny_llama().config},
        "max_cache_len: got 9.0",
    ),
    "zero": (KIVIConfig(), {"max_cache_len": 0, "config": tiny_llama().config}, "max_cache_len: got 0; allowed"),
    "paper": (KIVIConfig.paper(2), {"max_cache_len": 99, "config": tiny_llama().config}, 'policy: got "paper"'),
    "hqq": (KIVIConfig(backend="hqq"), {"max_cache_len": 99, "config": tiny_llama().config}, 'backend: got "hqq"'),
    "offloading": (
        KIVIConfig(),
        {"max_cache_len": 99, "config": tiny_llama().config, "offloading": True},
        "offloading: got True",
    ),
}


@pytest.mark.parametrize(("config", "kwargs", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(config, kwargs, message):
    if config.backend == "hqq":
        pytest.importorskip("hqq")
    with pytest.raises(ValueError, match=message):
        KIVICache(config, **kwargs)


def test_only_the_fixed_cache_says_that_it_can_be_compiled():
    assert fixed_cache(CONFIGS["2_bits"]).is_compileable
    assert not KIVICache(config=tiny_llama().config).is_compileable


@pytest.mark.parametrize(
    ("attention", "heads"), [("kivi", {}), ("sdpa", {}), ("kivi", {0: 8, 1: {"nbits_key": 16, "nbits_value": 4}})]
)
def test_a_compiled_step_on_packed_bytes(attention, heads, graphs, monkeypatch):
    """The kernels themselves, interpreted, in a graph: with "sdpa" the states may turn dense, with "kivi" never."""
    pytest.importorskip("triton")
    monkeypatch.setattr(kivicache.attention, "FUSED_DEVICES", ["cpu", "cuda"])
    model, inputs = tiny_llama(layers=1, attention=attention), prompt(batch=1, tokens=73, padding=5)
    config = KIVIConfig(nbits=2, residual_length=8, sink_length=3, heads={0: heads})
    growing, fixed = KIVICache(config), fixed_cache(config, 100, model)
    read: list[FixedPackedStates] = []
    dense = FixedPackedStates._read
    monkeypatch.setattr(FixedPackedStates, "_read", lambda self: read.append(self) or dense(self))
    expected = generate(model, inputs, growing, max_new_tokens=5)
    output = generate(model, inputs, fixed, max_new_tokens=5, compile_config=compiled("aot_eager"))
    assert torch.equal(output, expected)
    assert graphs() == 1 and (attention == "sdpa" or not read)
    dense = 'dense: in a compiled step the attention "sdpa" sees dense tensors: model.set_attn_implementation("kivi")'
    assert fixed.explain() == {0: "packed" if attention == "kivi" else dense}
    assert torch.equal(fixed.layers[0].keys, growing.layers[0].keys)


def test_a_dense_graph_is_hinted_at_once(monkeypatch, caplog):
    pytest.importorskip("triton")
    monkeypatch.setattr(kivicache.attention, "FUSED_DEVICES", ["cpu", "cuda"])
    kivicache.fixed._hint_attention.cache_clear()
    for attention, hints in (("kivi", 0), ("sdpa", 1), ("sdpa", 1)):
        cache = fixed_cache(KIVIConfig(), model=tiny_llama(attention=attention))
        cache.update(*torch.randn(2, 1, 2, 9, 16), 0)
        assert caplog.text.count('set_attn_implementation("kivi")') == hints


def test_layers_of_other_kinds_are_those_of_a_static_cache():
    config = Gemma3TextConfig(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8
    )
    cache = KIVICache(KIVIConfig(nbits=2, layers={3: {"nbits": 16}}), config=config, max_cache_len=64)
    kinds = [StaticSlidingWindowLayer, FixedKIVILayer, StaticSlidingWindowLayer, StaticLayer]
    assert [type(layer) for layer in cache.layers] == kinds
    assert cache.is_compileable and cache.is_sliding == [True, False, True, False]
    assert cache.explain()[0] == "StaticSlidingWindowLayer: left as it is"


def test_a_model_with_sliding_layers_generates_the_same(graphs):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=24, layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.3, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model, inputs = Gemma3ForCausalLM(config).eval(), prompt(padding=9)
    expected = generate(model, inputs, KIVICache(CONFIGS["8_4_bits"], config=config))
    cache = KIVICache(CONFIGS["8_4_bits"], config=config, max_cache_len=CAPACITY)
    assert torch.equal(generate(model, inputs, cache, compile_config=compiled()), expected)


def on_gpu(padding, nbits):
    """A model, a prompt, and a growing and a fixed cache that the kernels serve."""
    model = tiny_llama(head_dim=128, attention="kivi", initializer_range=0.05)
    model = copy.deepcopy(model).to("cuda", torch.bfloat16)
    cfg = KIVIConfig(nbits_key=nbits[0], nbits_value=nbits[1], residual_length=32)
    inputs = {name: tensor.cuda() for name, tensor in prompt(tokens=150, padding=padding).items()}
    return model, inputs, KIVICache(cfg), fixed_cache(cfg, 400, model)


GPU = pytest.mark.parametrize(
    ("padding", "nbits"), [(0, (2, 2)), (9, (4, 2)), (9, (8, 8))], ids=["2_bits", "k4v2_padded", "8_bits_padded"]
)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["cuda_graph", "traced"])
def test_generate_captures_the_step(backend, padding, nbits, graphs, monkeypatch):
    """Nothing is set but the attention: `generate` compiles by itself, with CUDA graphs."""
    model, inputs, growing, fixed = on_gpu(padding, nbits)
    monkeypatch.setattr(FixedPackedStates, "_read", lambda self: pytest.fail("went dense"))
    for turn in ("first", "on the same buffers", "on fresh ones"):
        fixed = fixed_cache(fixed.kivi_config, 400, model) if turn == "on fresh ones" else fixed
        fixed.reset()
        growing.reset()
        compile_config = backend and compiled(backend)
        output = generate(model, inputs, fixed, max_new_tokens=120, compile_config=compile_config)
        assert regret(model, inputs, output, growing) < 0.05, turn
        if backend is not None:  # not rounded elsewhere: the keys before the first attention are the same
            assert torch.equal(fixed.layers[0].keys, growing.layers[0].keys)
    assert graphs() == 1 and torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert fixed.explain() == {0: "packed", 1: "packed"}


@pytest.mark.gpu
def test_no_allocation_from_step_to_step(graphs):
    model = copy.deepcopy(tiny_llama(head_dim=128, attention="kivi")).to("cuda", torch.bfloat16)
    cache = fixed_cache(KIVIConfig(nbits=2), 4096, model)
    inputs = {name: tensor.cuda() for name, tensor in prompt(tokens=150).items()}
    addresses, seen = [], []

    def stop(input_ids, scores, **kwargs):
        addresses.append([tensor.data_ptr() for tensor in cache.layers[1]._stores[0].tensors])
        seen.append(torch.cuda.memory_allocated())
        return torch.zeros(2, dtype=torch.bool, device="cuda")

    generate(model, inputs, cache, max_new_tokens=200, stopping_criteria=[stop])
    assert addresses[0] == addresses[-1]
    assert seen[-1] - seen[20] < 2**16  # the tokens and their mask, no more


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [0, 30], ids=["", "left_padded"])
@pytest.mark.parametrize(
    "config",
    [
        KIVIConfig(nbits=2),
        KIVIConfig(nbits=4, rotation="hadamard"),
        KIVIConfig(nbits=2, backend="mse"),
        KIVIConfig(nbits_key=16, nbits_value=4),
        KIVIConfig(nbits=4, heads={0: {1: 2}, 1: {0: {"nbits_key": 8, "nbits_value": 2}}}),
    ],
    ids=str,
)
def test_gpu_cuda_graphs_on_the_portable_kernel(config, padding, graphs):
    """In float32; the second call of the same shape compiles nothing."""
    model = tiny_llama(heads=8, head_dim=128, attention="kivi", initializer_range=0.05)
    model = copy.deepcopy(model).cuda()
    inputs = {key: value.cuda() for key, value in prompt(tokens=300, padding=padding).items()}
    fixed = fixed_cache(config, 448, model)
    for _ in range(2):
        output = generate(model, inputs, fixed, max_new_tokens=100)
        compiled_graphs = graphs()
        assert all(reasons == "packed" for reasons in fixed.explain().values())
        assert regret(model, inputs, output, KIVICache(config)) < 0.05
        fixed.reset()
    assert graphs() == compiled_graphs == 1
