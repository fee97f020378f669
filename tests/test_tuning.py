"""The tuner from end to end, on a tiny random model."""

import copy
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from rich.console import Console

import kivicache
from kivicache import KIVICache, KIVIConfig, sensitivity, tuning
from kivicache.__main__ import main
from kivicache.fidelity import cache_argument
from kivicache.objectives import CachedKL
from kivicache.search import open_study
from kivicache.tuning_report import front, plot_front, plot_sensitivity, render_tuning, tuned_choices
from tests.tiny import VOCAB, bos_tokenizer, tiny_llama, word_tokenizer

BASE = KIVIConfig(residual_length=16, sink_length=4, backend="mse")
SMALL = {
    "base": BASE,
    "group_sizes": (8, 16),
    "trials": 12,
    "groups": 3,
    "sequences": 2,
    "profiled": 1,
    "prefill": 84,
    "scored": 8,
}


def words(count):
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (count,)).tolist())


def run(model=None, texts=None, budget=6.0, **options):
    model = model or tiny_llama(layers=3)
    return tuning.run(model, word_tokenizer(), texts or [words(300)], budget=budget, **SMALL | options)


class Counted:
    """A loss that counts how often it is asked, and about what."""

    def __init__(self):
        self.asked = []

    def __call__(self, config):
        self.asked.append(config.to_yaml())
        return sum(32 - layer.nbits_key - layer.nbits_value for layer in map(config.layer, range(3)))


@pytest.mark.parametrize("per_head", [False, True])
def test_the_result_keeps_the_budget_in_a_real_cache_and_its_loss_is_true(per_head):
    model, texts = tiny_llama(layers=3), [words(150), words(150)]
    result = run(model, texts, per_head=per_head)
    cache = KIVICache(result.config, config=model.config)
    tokens = tuning.calibration(word_tokenizer(), texts, result.settings, 2)
    with torch.no_grad():
        model(tokens[:, :84], **{cache_argument(model): cache})
    assert cache.memory().packed_bits_per_value == pytest.approx(result.best.bits)
    assert result.best.bits <= 6.0
    assert result.best.loss == pytest.approx(CachedKL(model, tokens, 84, 8)(result.config), rel=1e-4)
    assert result.best.loss <= min(point.loss for point in result.trials)
    assert KIVIConfig.from_dict(result.config.to_dict()) == result.config
    assert all(result.config.layer(i).sink_length == 4 for i in range(3))  # what is not searched is the base's
    assert len(tuned_choices(result)) == (6 if per_head else 3)


def test_losses_of_one_unit_alone_do_not_depend_on_the_bases_own_bits():
    texts, base = [words(300)], KIVIConfig.from_dict(BASE.to_dict() | {"layers": {0: {"nbits": 2}}})
    profiles = [run(texts=texts, base=own, trials=1, per_head=True).measured.profile for own in (BASE, base)]
    assert profiles[0] == profiles[1]


class Favourite:
    """A loss that wants bits and, far more, one value of a field."""

    def __init__(self, name, value):
        self.field, self.value = name, value

    def __call__(self, config):
        layers = list(map(config.layer, range(3)))
        bits = sum(layer.nbits_key + layer.nbits_value for layer in layers)
        return 100 - bits + 100 * sum(getattr(layer, self.field) != self.value for layer in layers)


@pytest.mark.parametrize("trials", [1, 12])
@pytest.mark.parametrize("rotation", [None, "hadamard"])
def test_of_equal_bits_the_objective_decides(rotation, trials):
    result = run(objective=Favourite("rotation", rotation), group_sizes=(8,), trials=trials)  # K2V2 alone fits
    assert [result.config.layer(i).rotation for i in range(3)] == [rotation] * 3
    assert result.best.loss == 100 - 3 * 4 == min(p.loss for p in result.measured.uniform if p.bits <= 6.0)


@pytest.mark.parametrize("per_head", [False, True])
def test_no_uniform_setting_under_the_budget_is_better(per_head, capsys):
    result = run(objective=Favourite("group_size", 16), per_head=per_head)  # heads keep the base's 32
    assert result.best.loss <= min(p.loss for p in result.measured.uniform if p.bits <= 6.0)
    assert result.config.layer(0).group_size == 16 and result.best.bits <= 6.0
    render_tuning(result, Console(width=120, highlight=False, markup=False))
    assert "tuned  " in capsys.readouterr().out


def test_a_uniform_setting_keeps_what_the_base_says_of_a_layer():
    base = KIVIConfig.from_dict(BASE.to_dict() | {"layers": {1: {"residual_length": 32}}})
    result = run(base=base, objective=Favourite("group_size", 16), per_head=True)
    assert [result.config.layer(i).residual_length for i in range(3)] == [16, 32, 16]


def test_trials_are_different_settings(capsys):
    loss = Counted()
    result = run(objective=loss, trials=60, rotations=(None,), group_sizes=(8,), budget=6.5)
    assert len({point.bits for point in result.trials}) < len(result.trials) < 60  # there are no more that fit
    render_tuning(result, Console(width=120, highlight=False, markup=False))
    assert f"different settings tried: {len(result.trials)}" in capsys.readouterr().out
    assert len(loss.asked) - len(set(loss.asked)) <= len(result.measured.uniform)  # seen uniform and in the search


def test_any_callable_is_an_objective():
    loss = Counted()
    result = run(objective=loss, rotations=(None,), group_sizes=(8,), budget=9.0)
    assert result.config.to_yaml() in loss.asked
    assert result.best.loss == loss(result.config)
    chosen = [result.config.layer(i) for i in range(3)]
    # 32 / 8 bits are the scales', so a layer can spend 5 bits more than K2V2, wherever: sums of 10 to a layer
    assert sum(layer.nbits_key + layer.nbits_value for layer in chosen) == 30


def test_tune_gives_the_config():
    texts, model = [words(300)], tiny_llama()
    config = kivicache.tune(model, word_tokenizer(), texts, budget=6.0, **SMALL)
    assert config == run(model, texts).config
    assert isinstance(config, KIVIConfig) and set(config.layers) == {0, 1}


def test_resume_goes_on_and_repeats_nothing(tmp_path):
    texts, storage = [words(300)], str(tmp_path / "journal")
    loss = Counted()
    first = run(texts=texts, storage=storage, objective=loss, trials=5)
    asked = len(loss.asked)
    again = run(texts=texts, storage=storage, objective=loss, trials=5, resume=True)
    assert len(loss.asked) == asked
    assert (again.config, again.best, again.measured) == (first.config, first.best, first.measured)
    more = run(texts=texts, storage=storage, objective=loss, trials=9, resume=True)
    assert asked <= len(loss.asked) <= asked + 4
    assert len(more.trials) == 9 and more.best.loss <= first.best.loss


def test_a_profile_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    texts, storage, whole, measured = [words(300)], str(tmp_path / "journal"), Counted(), []
    run(texts=texts, objective=whole, trials=1)

    class Interrupted(Counted):
        __qualname__ = "Counted"

        def __call__(self, config):
            if len(self.asked) == len(whole.asked) - 10:  # among the last layer's losses
                raise KeyboardInterrupt
            return super().__call__(config)

    def errors_measured(fidelity, layer_idx, *given):
        measured.append(layer_idx)
        return errors(fidelity, layer_idx, *given)

    def stop_at_two_layers(stage, done, total, note):
        if (stage, done) == ("errors by layer", 2):
            raise KeyboardInterrupt

    errors = sensitivity._layer_errors
    monkeypatch.setattr(sensitivity, "_layer_errors", errors_measured)
    loss, interrupted = Counted(), Interrupted()
    for options in ({"on_progress": stop_at_two_layers}, {"objective": interrupted, "resume": True}):
        with pytest.raises(KeyboardInterrupt):
            run(texts=texts, storage=storage, trials=1, **{"objective": loss} | options)
    run(texts=texts, storage=storage, trials=1, objective=loss, resume=True)
    assert measured == [0, 1, 2]
    assert len(loss.asked) < len(whole.asked) / 2  # of the losses, one layer's were lost
    assert set(interrupted.asked + loss.asked) == set(whole.asked)


def test_of_two_workers_that_measure_the_same_the_later_takes_the_earlier_ones():
    study = open_study(None, "study", 0, resume=False)

    def measure():
        study.set_user_attr("losses", [1.0])  # another worker's, meanwhile
        return [2.0]

    assert [tuning._kept(study, "losses", measure) for _ in range(2)] == [[1.0], [1.0]]


@pytest.mark.parametrize(("name", "value"), [("budget", 5.5), ("per_head", True), ("prefill", 60)])
def test_a_study_of_other_settings_is_not_resumed(tmp_path, name, value):
    storage = str(tmp_path / "journal")
    run(storage=storage, objective=Counted(), trials=1)
    with pytest.raises(ValueError, match=rf"{name}: got {value}; allowed: .*, as in the study that is resumed"):
        run(storage=storage, objective=Counted(), resume=True, **{name: value})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("texts", lambda: {"texts": [words(300)]}),
        ("objective", lambda: {"objective": None}),
        ("model", lambda: {"model": tiny_llama(layers=3, seed=1)}),
        ("dtype", lambda: {"model": copy.deepcopy(tiny_llama(layers=3)).bfloat16()}),
    ],
)
def test_a_study_of_other_losses_is_not_resumed(tmp_path, name, change):
    given = {"texts": [words(300)], "objective": Counted(), "storage": str(tmp_path / "journal"), "trials": 1}
    run(**given)
    with pytest.raises(ValueError, match=rf"{name}: got .*; allowed: .*, as in the study that is resumed"):
        run(**given | change(), resume=True)


@pytest.mark.parametrize("name", ["kivicache", "torch", "transformers", "scikit-learn"])
def test_a_study_of_other_versions_is_not_resumed(tmp_path, monkeypatch, name):
    given = {"texts": [words(300)], "objective": Counted(), "storage": str(tmp_path / "journal"), "trials": 1}
    run(**given)
    monkeypatch.setattr(tuning, "__version__", "0.0.1" if name == "kivicache" else kivicache.__version__)
    monkeypatch.setattr(tuning, "version", lambda package: "0.0.1" if package == name else version(package))
    with pytest.raises(ValueError, match=rf"{name}: got 0.0.1; allowed: \d.*, as in the study that is resumed"):
        run(**given, resume=True)


def test_calibration_begins_each_piece_as_the_tokenizer_begins_a_text():
    settings = tuning.TuningSettings(6.0, prefill=400)
    plain, begun = (
        tuning.calibration(tokenizer, [words(3000)], settings, 3) for tokenizer in (word_tokenizer(), bos_tokenizer())
    )
    assert plain.shape == begun.shape == (3, 425)
    assert begun[:, 0].tolist() == [1, 1, 1] and (begun[:, 1:] > 1).all() and (plain > 1).all()


def test_what_is_refused_leaves_no_study_behind(tmp_path):
    storage, loss = str(tmp_path / "journal"), Counted()
    for refused, message in (({"budget": 2.5}, "budget: got 2.5"), ({"texts": [words(20)]}, "text: got 20 tokens")):
        with pytest.raises(ValueError, match=message):
            run(storage=storage, objective=loss, **refused)
    assert not loss.asked
    run(storage=storage, objective=loss, trials=1)


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="objective: got nan; allowed: a finite loss"):
        run(objective=lambda config: float("nan"))


def test_what_was_measured_serves_another_budget():
    texts, loss = [words(300)], Counted()
    first = run(texts=texts, objective=loss)
    asked = len(loss.asked)
    second = run(texts=texts, objective=loss, budget=8.0, measured=first.measured)
    assert len(loss.asked) - asked <= 12
    assert 6.0 < second.best.bits <= 8.0 and second.best.loss < first.best.loss


WORKER = """
import pathlib, sys, time, torch
torch.set_num_threads(1)
from tests.test_tuning import Counted, run
texts, storage, seed, other = sys.argv[1:]
class Meeting(Counted):
    name = "Counted"
    def __call__(self, config):
        pathlib.Path(storage + seed).touch()
        deadline = time.monotonic() + 120
        while not pathlib.Path(storage + other).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return super().__call__(config)
run(texts=[texts], storage=storage, seed=int(seed), trials=40, resume=True, objective=Meeting())
"""


def test_two_worker_processes_share_one_study(tmp_path):
    texts, storage = words(300), str(tmp_path / "journal")
    run(texts=[texts], storage=storage, trials=1, objective=Counted())
    command = [sys.executable, "-c", WORKER, texts, storage]
    # neither measures its first trial before the other is there, however late that starts
    workers = [subprocess.Popen([*command, *seeds]) for seeds in (("1", "2"), ("2", "1"))]
    assert [worker.wait() for worker in workers] == [0, 0]
    result = run(texts=[texts], storage=storage, trials=40, resume=True, objective=Counted())
    assert 40 <= len(result.trials) <= 41  # each worker may have had one on the way
    assert all((tmp_path / f"journal{seed}").exists() for seed in (1, 2))  # both workers did their part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.5}, "budget: got 1.5; allowed: a number of bits between 2 and 16"),
        ({"budget": "3"}, "budget: got '3'; allowed"),
        ({"budget": 2.5}, r"budget: got 2.5; allowed: at least 4.000, the fewest true bits"),
        ({"trials": 0}, "trials: got 0; allowed: a whole number from 1"),
        ({"groups": 1.5}, "groups: got 1.5; allowed: a whole number from 1"),
        ({"group_sizes": (0,)}, "group_size: got 0; allowed"),
        ({"group_sizes": ()}, r"group_sizes: got \(\); allowed: at least one group_size"),
        ({"rotations": ("givens",)}, "rotation: got 'givens'; allowed: None, 'hadamard'"),
        ({"group_sizes": (8, 128)}, "prefill: got 84; allowed: more tokens, as K2V2 g128 packs none"),
        ({"base": KIVIConfig(layers={1: {"residual_length": 80}})}, "beside 32 sinks and a residual of 80"),
        ({"base": KIVIConfig(layers={1: {"nbits": 8}})}, r"base: got layers\[1\].nbits_key; allowed: layers without"),
        ({"base": KIVIConfig(layers={1: {"rotation": None}})}, r"base: got layers\[1\].rotation; allowed"),
        ({"base": KIVIConfig(heads={1: {0: 8}})}, r"base: got heads of layers \[1\]; allowed: none"),
        ({"base": KIVIConfig(heads={1: {0: 8}}), "per_head": True}, "base: got heads of layers"),
        ({"base": KIVIConfig(group_size=64)}, r"base: got group_size 64; allowed: 8, 16, which are searched"),
        (
            {"base": KIVIConfig(rotation="hadamard"), "rotations": (None,)},
            "base: got rotation 'hadamard'; allowed: None",
        ),
        (
            {"base": KIVIConfig.paper(2), "group_sizes": (8, 256), "prefill": 200},
            "group_sizes: got 256; allowed: what base's other settings let K2V2 g256 have; residual_length: got 128",
        ),
        ({"seed": -1}, "seed: got -1; allowed: a whole number from 0"),
        ({"bits": 3}, "bits: unknown setting; allowed: budget, trials"),
        ({"sequences": 50}, "text: got 300 tokens; allowed: at least 4650"),
        ({"texts": "one text"}, r"texts: got the text 'one text'; allowed: several texts"),
    ],
)
def test_bad_input_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        run(**{"objective": Counted(), **options})


def test_a_missing_library_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(tuning, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r'optuna is not installed; install it with: pip install "kivicache\[tune\]"'
    ):
        run()


def test_front_is_what_no_point_beats():
    points = [tuning.Point(b, x) for b, x in torch.rand(40, 2).tolist()]
    expected = {p for p in points if not any(q.bits <= p.bits and q.loss <= p.loss and q != p for q in points)}
    kept = front(points)
    assert set(kept) == expected and kept == sorted(kept, key=lambda point: point.bits)


def test_table_and_pictures_show_the_result(tmp_path, capsys):
    result = run()
    render_tuning(result, Console(width=120, highlight=False, markup=False))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    [tuned] = [line for line in lines if line.startswith("tuned")]
    assert tuned.split()[1:] == [f"{result.best.bits:.3f}", f"{result.best.loss:.5f}"]
    shown = {line.rsplit(maxsplit=3)[0].strip() for line in lines if line.startswith("K")}
    assert shown == {point.label for point in result.measured.uniform if point.bits <= result.best.bits + 1}
    for plot in (plot_front, plot_sensitivity):
        assert plot(result, tmp_path / "picture.png").stat().st_size > 10_000


@pytest.fixture
def folder(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(words(6500))
    BASE.to_yaml(tmp_path / "base.yaml")
    return tmp_path


def command(folder, *more):
    given = {"--model": "model", "--text": "text.txt", "--config": "base.yaml", "--out": "best.yaml"}
    paths = [word for name, file in given.items() for word in (name, str(folder / file))]
    return ["tune", *paths, "--budget", "6", "--group-sizes", "8", "--rotations", "none", *more]


def test_command_from_end_to_end(folder, capsys):
    assert main(command(folder, "--trials", "3")) == 0
    output, progress = capsys.readouterr()
    assert "tuned" in output and "taken: " in output
    assert "errors by layer: 0 of 2" in progress  # lines, as this is no terminal
    assert (
        "uniform settings: 9 of 9" in progress and "search: 1 of 1 no other setting fits" in progress
    )  # the ends at least
    config = KIVIConfig.from_yaml(folder / "best.yaml")
    assert set(config.layers) == {0, 1} and config.sink_length == 4
    for name in ("front", "sensitivity"):
        assert (folder / f"best.{name}.png").read_bytes().startswith(b"\x89PNG")
    assert main(command(folder, "--trials", "3")) == 2
    assert "has a study 'kivicache' already; allowed: resume it" in capsys.readouterr().err
    assert main(command(folder, "--trials", "4", "--resume")) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "1"], "budget: got 1.0; allowed: a number of bits between 2 and 16"),
        (["--text", "nowhere.txt"], "--text: nowhere.txt: no such file"),
        (["--task", "fidelity"], "task: got 'fidelity'; allowed: a task with right answers"),
        (["--group-sizes", "0"], "group_size: got 0"),
        (["--prefill", "20"], "prefill: got 20; allowed: more tokens"),
        (["--sequences", "30"], "text: got 6500 tokens; allowed: at least 16110"),
        (["--config", "nowhere.yaml"], "--config: nowhere.yaml"),
        (["--out", "."], "--out: got .; allowed: a file in a folder that there is"),
        (["--out", "nowhere/best.yaml"], "--out: got nowhere/best.yaml; allowed: a file in a folder"),
        (["--storage", "nowhere/trials"], "storage: nowhere/trials cannot be opened: "),
        (["--storage", "sqlite:///nowhere/trials"], "storage: sqlite:///nowhere/trials cannot be opened: "),
    ],
)
def test_command_refuses_bad_input(folder, more, message, capsys):
    assert main(command(folder, *more)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 + err.count("uniform settings")
