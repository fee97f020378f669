"""The demo: its comparison against plain greedy loops, its two outputs, and what it says to a wrong call."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache

from kivicache import KIVICache, KIVIConfig, MemoryReport, demo
from kivicache.__main__ import main
from tests.tiny import tiny_llama, word_tokenizer

COARSE = KIVIConfig(nbits=2, group_size=8, residual_length=8, sink_length=0)
PROMPT = " ".join(f"w{3 + i * 7 % 90}" for i in range(60))


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A tiny model in a local folder, as --model takes it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def parted(tokenizer):
    """A comparison whose texts part: tiny models with large weights do so at 2 bits."""
    result = demo.compare(tiny_llama(), tokenizer, PROMPT, COARSE, 24)
    assert result.divergence is not None
    return result


@torch.no_grad()
def greedy(model, input_ids, cache, count):
    """``count`` greedy tokens, one forward pass each."""
    tokens = []
    for _ in range(count):
        logits = model(input_ids, past_key_values=cache).logits
        tokens.append(int(logits[0, -1].argmax()))
        input_ids = torch.tensor([tokens[-1:]])
    return tuple(tokens)


def test_tokens_and_divergence_are_those_of_plain_loops(parted, tokenizer):
    model = tiny_llama()
    input_ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    full = greedy(model, input_ids, DynamicCache(), 24)
    kivi = greedy(model, input_ids, KIVICache(COARSE), 24)
    assert (parted.full_precision.token_ids, parted.kivi.token_ids) == (full, kivi)
    index = 0
    while full[index] == kivi[index]:
        index += 1
    pieces = tokenizer.decode([full[index]]), tokenizer.decode([kivi[index]])
    assert parted.divergence == demo.Divergence(index, *pieces)
    assert parted.full_precision.text == tokenizer.decode(full, skip_special_tokens=True)


def test_memory_is_that_of_the_caches_which_generated(parted):
    tokens = parted.prompt_tokens + 24 - 1  # the last token is never fed back
    values = 2 * 2 * 2 * 16 * tokens  # keys and values of 2 layers, 2 kv heads, head_dim 16
    assert parted.full_precision.memory == MemoryReport(full_precision=4 * values, values=values)
    assert parted.kivi.memory.values == values
    assert 0 < parted.kivi.memory.packed_values < values


def test_times_are_positive_and_the_speed_leaves_the_prefill_out(parted):
    for run in (parted.full_precision, parted.kivi):
        assert run.prefill_seconds > 0
        assert run.tokens_per_second == pytest.approx(23 / run.decode_seconds)
    assert replace(parted.kivi, token_ids=(5,)).tokens_per_second is None


def test_sixteen_bits_give_the_same_text(tokenizer):
    result = demo.compare(tiny_llama(), tokenizer, PROMPT, KIVIConfig(nbits=16), 24)
    assert result.divergence is None
    assert result.full_precision.token_ids == result.kivi.token_ids
    assert result.full_precision.text == result.kivi.text != ""


@pytest.mark.parametrize(
    ("first", "second", "index"),
    [((), (), None), ((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1,), (1, 2), 1), ((0,), (1,), 0), ((), (0,), 0)],
)
def test_first_difference(first, second, index):
    assert demo.first_difference(first, second) == demo.first_difference(second, first) == index


@pytest.mark.filterwarnings("error::FutureWarning")
def test_progress_goes_stage_by_stage(tokenizer):
    seen = []
    demo.compare(tiny_llama(), tokenizer, PROMPT, COARSE, 3, lambda *step: seen.append(step))
    assert seen == [(stage, done) for stage in ("full precision", "KIVICache") for done in range(4)]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_rendering_shows_both_texts_and_marks_where_they_part(parted, width):
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    demo.render(parted, console)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    for run in (parted.full_precision, parted.kivi):
        assert all(piece.strip() in shown for piece in run.pieces)
    for piece in (parted.divergence.full_precision, parted.divergence.kivi):
        assert f"»{piece.strip()}" in shown
    assert "decode only" in shown
    assert f"{parted.kivi.memory.bits_per_value:.2f}" in shown


def test_rendering_says_when_nothing_is_packed(tokenizer):
    console = Console(file=io.StringIO(), width=100)
    demo.render(demo.compare(tiny_llama(), tokenizer, "w3 w4", KIVIConfig(), 2), console)
    assert "Nothing was packed" in console.file.getvalue()
    assert "All 2 new tokens are the same." in console.file.getvalue()


def test_json_is_all_that_is_on_stdout(folder, capsys):
    assert main(["demo", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["device"], result["dtype"], result["max_new_tokens"]) == (result["device"], "float32", 5)
    assert KIVIConfig.from_dict(result["config"]) == KIVIConfig()
    for name in ("full_precision", "kivi"):
        run = result[name]
        assert len(run["token_ids"]) == 5
        assert isinstance(run["text"], str)
        assert min(run["prefill_seconds"], run["decode_seconds"], run["tokens_per_second"]) > 0
        assert run["memory"]["total"] > 0 < run["memory"]["bits_per_value"]
    assert result["divergence"] is None or set(result["divergence"]) == {"index", "full_precision", "kivi"}


def test_a_yaml_config_is_used(folder, tmp_path, capsys):
    COARSE.to_yaml(tmp_path / "coarse.yaml")
    call = ["demo", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", "2", "--config"]
    assert main([*call, str(tmp_path / "coarse.yaml")]) == 0
    assert "KIVICache K2V2 g8" in capsys.readouterr().out
    assert main([*call[:-1], "--preset", "3.5bit"]) == 0
    assert "KIVICache K4V2 g64, hadamard" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "COMMAND"),
        (("demo", "--nbits", "3"), "--nbits"),
        (("demo", "--preset", "1bit"), "2.5bit"),
        (("demo", "--nbits", "2", "--preset", "3bit"), "not allowed with"),
        (("demo", "--nbits", "4", "--config", "x.yaml"), "not allowed with"),
        (("demo", "--max-new-tokens", "0"), "--max-new-tokens: got '0'"),
        (("demo", "--max-new-tokens", "many"), "--max-new-tokens: got 'many'"),
        (("demo", "--prompt", " "), "--prompt: got an empty text"),
        (("demo", "--config", "/no/such.yaml"), "/no/such.yaml: No such file"),
        (("demo", "--config", "{bad}"), "nbits: got 5"),
        (("demo", "--config", "{broken}"), "broken.yaml"),
        (("demo", "--device", "abacus"), "--device: 'abacus'"),
        (("demo", "--model", "/no/such/model"), "model '/no/such/model' cannot be loaded"),
        (("demo", "--model", "{folder}", "--config", "{outside}"), "layers: got layer 7"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(arguments, said, folder, tmp_path, capsys):
    paths = {name: tmp_path / f"{name}.yaml" for name in ("bad", "broken", "outside")}
    for path, text in zip(paths.values(), ("nbits: 5", "a: [", "layers: {7: {nbits: 4}}"), strict=True):
        path.write_text(text)
    try:
        code = main([argument.format(folder=folder, **paths) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
