"""The run over caches and tasks: what it gives, how it goes on after a stop, and what it writes."""

import csv
import io
import json
import re
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from rich.console import Console

from kivicache import KIVIConfig, evaluation_report
from kivicache.__main__ import main
from kivicache.evaluation import evaluate
from kivicache.evaluation_report import render, report, write_csv
from kivicache.tasks import parse_task
from tests.tiny import VOCAB, tiny_llama, word_tokenizer

CACHES = ["dynamic", "kivi:16", "kivi:2:g8:r8:s4", "kivi:8:g8:r8:s4", "hf-fp8"]
PASSKEY = "passkey:lengths=[700,900],depths=2"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{i}" for i in torch.randint(3, VOCAB, (400,)).tolist()))
    return path


@pytest.fixture(scope="module")
def fidelity(text):
    return f"fidelity:data={text},sequences=3,prefill=60,steps=20,step=8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in a local folder, as --model takes it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def run(caches, tasks, model=None, **kwargs):
    steps = []
    results = evaluate(
        model or tiny_llama(), word_tokenizer(), caches, tasks, on_progress=lambda *step: steps.append(step), **kwargs
    )
    return results, steps


def test_results_come_in_order_and_tell_exact_from_coarse(fidelity):
    results, steps = run(CACHES, [fidelity])
    assert [result.cache.name for result in results] == CACHES
    assert [done for done, _, _ in steps] == list(range(16)) and {total for _, total, _ in steps} == {15}
    dynamic, sixteen, coarse, fine, fp8 = (result.metrics for result in results)
    assert dynamic == sixteen and dynamic["kl_mean"] == 0 and dynamic["bits_per_value"] == 16
    assert 0 < fine["kl_mean"] < coarse["kl_mean"]
    assert fp8["bits_per_value"] < 9 and coarse["bits_per_packed_value"] == 6
    assert all(len(result.records) == 3 for result in results)


def test_what_is_stored_is_not_measured_again(fidelity, tmp_path):
    store = tmp_path / "deep" / "records.jsonl"
    first, steps = run(CACHES[:2], [fidelity], store=store)
    assert len(steps) == 7
    again, steps = run(CACHES[:2], [fidelity], store=store)
    assert steps == [(0, 0, "done")] and again == first
    more, steps = run(CACHES[:3], [fidelity], store=store)
    assert {what for _, _, what in steps} == {"fidelity kivi:2:g8:r8:s4", "done"} and more[:2] == first
    assert run(CACHES[:2], [fidelity], store=store, limit=2)[0][0].records == first[0].records[:2]
    _, steps = run(CACHES[:1], [fidelity.replace("step=8", "step=4")], store=store)
    assert len(steps) == 4  # another step is another measurement


def test_what_is_stored_of_settings_by_layer_is_not_measured_again(fidelity, tmp_path):
    config, spec = KIVIConfig(layers={layer: {"nbits": 8} for layer in (2, 10)}), tmp_path / "mine.yaml"
    config.to_yaml(spec)  # 2 stands before 10, but "10" before "2"
    for _ in range(2):
        _, steps = run([str(spec)], [fidelity], store=tmp_path / "records.jsonl", model=tiny_llama(layers=11))
    assert steps == [(0, 0, "done")]


@pytest.mark.parametrize(
    ("changed", "measured"),
    [("torch", {"dynamic", "kivi:2:g8:hqq", "hf-fp8"}), ("hqq", {"kivi:2:g8:hqq"}), ("optimum-quanto", set())],
)
def test_what_is_stored_of_another_library_is_not_used(changed, measured, fidelity, tmp_path, monkeypatch):
    pytest.importorskip("hqq")
    caches, store = ["dynamic", "kivi:2:g8:hqq", "hf-fp8"], tmp_path / "records.jsonl"
    run(caches, [fidelity], store=store, limit=1)
    installed = metadata.version
    if changed == "torch":
        monkeypatch.setattr(torch, "__version__", "9")
    monkeypatch.setattr(metadata, "version", lambda name: "9" if name == changed else installed(name))
    _, steps = run(caches, [fidelity], store=store, limit=1)
    assert {what for _, _, what in steps} == {f"fidelity {cache}" for cache in measured} | {"done"}


def test_an_item_that_packs_nothing_tells_nothing_of_packed_values():
    short, long = (run(["kivi:2", "kivi:16"], [f"passkey:lengths=[{n}],depths=1"])[0] for n in ("150", "700"))
    both = run(["kivi:2", "kivi:16"], ["passkey:lengths=[150,700],depths=1"])[0]
    assert [result.metrics["bits_per_packed_value"] for result in short] == [16, 16]
    assert [result.metrics["bits_per_packed_value"] for result in both] == [3.5, 16]
    assert both[0].metrics["bits_per_value"] == (16 + long[0].metrics["bits_per_value"]) / 2


def test_a_store_that_is_no_text_is_named(fidelity, tmp_path):
    store = tmp_path / "records.jsonl"
    store.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"store: .*records\.jsonl: allowed: JSON lines in UTF-8"):
        run(["dynamic"], [fidelity], store=store)


def test_what_is_stored_of_another_model_is_not_used(fidelity, tmp_path):
    models = [tiny_llama(seed=seed) for seed in (0, 1)]
    assert models[0].name_or_path == models[1].name_or_path
    kept = {"store": tmp_path / "records.jsonl"}
    first, second = (evaluate(model, word_tokenizer(), ["dynamic"], [fidelity], **kept) for model in models)
    assert first[0].metrics["perplexity"] != second[0].metrics["perplexity"]


def test_caches_from_files_of_one_name_stand_apart(fidelity, tmp_path):
    files = []
    for nbits in (2, 8):
        files.append(tmp_path / str(nbits) / "mine.yaml")
        files[-1].parent.mkdir()
        KIVIConfig(nbits=nbits, group_size=8, residual_length=8, sink_length=4).to_yaml(files[-1])
    coarse, fine = run([*map(str, files)], [fidelity])[0]
    assert (coarse.cache.name, fine.cache.name) == (str(files[0]), str(files[1]))
    assert coarse.metrics["kl_mean"] > fine.metrics["kl_mean"]


def test_a_run_goes_on_after_a_stop(fidelity, tmp_path):
    store = tmp_path / "records.jsonl"

    def stop(done, total, what):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_llama(), word_tokenizer(), CACHES[:3], [fidelity], store=store, on_progress=stop)
    with store.open("a") as file:
        file.write('\n{"key": {"model"')  # a line that a crash cut off
    results, steps = run(CACHES[:3], [fidelity], store=store)
    assert steps[0][1] == 9 - 4
    assert [r.metrics for r in results] == [r.metrics for r in run(CACHES[:3], [fidelity])[0]]
    assert run(CACHES[:3], [fidelity], store=store)[1] == [(0, 0, "done")]


@pytest.mark.parametrize(
    ("caches", "tasks", "said"),
    [
        (["dynamic", "dynamic"], ["fidelity"], "cache: got 'dynamic' twice"),
        (["dynamic"], ["passkey", "passkey:depths=2"], "task: got 'passkey' twice"),
        (["hf-quanto:8"], [PASSKEY], "cache 'hf-quanto:8'"),
        (["dynamic"], ["gsm8k:data={few}"], "task gsm8k: got no items"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(caches, tasks, said, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text('{"question": "w5", "answer": "#### 1"}\n' * 4)  # all of them are examples
    tasks = [task.format(few=few) for task in tasks]
    with pytest.raises(ValueError, match=said):
        evaluate(tiny_llama(), word_tokenizer(), caches, tasks, on_progress=lambda *step: pytest.fail("it ran"))


def test_a_cache_that_fails_is_named(fidelity, tmp_path):
    store = tmp_path / "records.jsonl"
    with pytest.raises(ValueError, match=r"cache 'hf-quanto:4:g64:a-1/0' fails on fidelity, item 0: "):
        run(["dynamic", "hf-quanto:4:g64:a-1/0"], [fidelity], store=store)  # 60 tokens: not whole groups of 64
    assert run(["dynamic"], [fidelity], store=store)[1][0][1] == 2


def test_tables_and_files(fidelity, tmp_path):
    pytest.importorskip("matplotlib")
    results, _ = run(CACHES, [fidelity, PASSKEY])
    files = report(results, tmp_path, "tiny")
    assert [file.name for file in files] == ["fidelity.csv", "fidelity.png", "passkey.csv", "passkey.png"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    lines = files[0].read_text().splitlines()
    assert lines[0].startswith("# tiny, fidelity:data=words.txt,sequences=3,") and "torch" in lines[0]
    for row, result in zip(csv.DictReader(lines[1:]), results[:5], strict=True):
        assert row["cache"] == result.cache.name and row["items"] == "3"
        assert float(row["kl_mean"]) == pytest.approx(result.metrics["kl_mean"], rel=1e-4)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[1::2])
    console = Console(file=io.StringIO(), width=140)
    render(results, console)
    shown = console.file.getvalue()
    assert all(shown.count(cache) >= 2 for cache in CACHES)
    assert f"{results[2].metrics['perplexity']:.2f}" in shown


def test_a_run_that_packs_nothing_says_so_and_still_has_a_picture(fidelity, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    results, _ = run(["dynamic", "kivi:2", "kivi:16"], [fidelity])  # 80 tokens, of which 160 stay exact
    drawn = []
    monkeypatch.setattr(evaluation_report, "save", lambda figure, path, **kwargs: drawn.append(figure) or path)
    report(results, tmp_path, "tiny")
    for axes in drawn[0].axes:
        points = [tuple(point) for collection in axes.collections for point in collection.get_offsets().tolist()]
        assert points == [(16, 0)] * 3 and {text.get_text() for text in axes.texts} >= {"dynamic", "kivi:2"}
    console = Console(file=io.StringIO(), width=140)
    render(results, console)
    assert "No value takes less than 16 bits in kivi:2: the texts are no longer" in console.file.getvalue()


def test_a_dataset_by_name_is_written_in_full(tmp_path):
    results, _ = run(["dynamic"], [PASSKEY])
    task = parse_task("longbench:data=owner/name/config")
    path = write_csv([replace(results[0], task=task)], tmp_path / "table.csv", "tiny")
    assert "data=owner/name/config," in path.read_text()


def test_the_command_line(folder, fidelity, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "140")
    call = ["eval", "--model", folder, "--cache", *CACHES[:3], "--task", fidelity, PASSKEY, "--out", str(tmp_path)]
    assert main([*call, "--limit", "2"]) == 0
    out, err = capsys.readouterr()
    lines = re.findall(r"^.*\d of 12$", err, re.MULTILINE)  # as this is no terminal
    assert lines[0] == "fidelity dynamic: 0 of 12" and lines[-1] == "done: 12 of 12"
    assert len(re.findall(r"kivi:2:g8:r8:s4", out)) == 2 and "ppl" in out
    assert str(tmp_path / "fidelity.csv") in out
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines() if line]
    assert len(records) == 3 * 2 * 2
    assert main([*call, "--limit", "2"]) == 0
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 1 + 12


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cache", "kivi:3"), "cache 'kivi:3': nbits: got 3"),
        (("--task", "speed"), "task: got 'speed'"),
        (("--task", "fidelity:data=no-such.txt"), "data: got 'no-such.txt'; allowed: a file, or OWNER/NAME"),
        (("--limit", "0"), "--limit: got '0'"),
        (("--out", __file__), f"--out: got the file {__file__}; allowed: a folder"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(arguments, said, folder, tmp_path, capsys):
    try:
        code = main(["eval", "--model", folder, "--out", str(tmp_path), *arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err
