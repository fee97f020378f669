"""[`tune`]: a [`KIVIConfig`] for one model, the best under a budget of true bits (KVTuner, arXiv 2502.04420)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kivicache.config import KIVIConfig
from kivicache.fidelity import CachedKL, spread_sequences
from kivicache.search import average_bits, chosen_in, cluster, expand, open_study, prune, search
from kivicache.sensitivity import Choice, Profile, Sensitivity, Unit, assigned, choices, profile_errors

if TYPE_CHECKING:
    from optuna.study import Study

Objective = Callable[[KIVIConfig], float]
OnProgress = Callable[[str, int, int, str], object]  # (stage, how much of it is done, of how much, a note)
DEFAULT_BASE = KIVIConfig(backend="mse")
_DATASET_ROWS = 2000
STAGES = ("errors by layer", "loss by layer", "uniform settings", "search")


@dataclass(frozen=True)
class TuningSettings:
    """What is searched, and on how much text.

    Attributes:
        budget: true bits per packed value, scales and minima included, at the most.
        trials: settings that the search tries.
        base: every setting that the search does not choose.
        group_sizes, rotations: those that a layer may choose.
        per_head: choose for every kv head; heads choose bits alone, group size and rotation are those of ``base``.
        groups: about as many groups of layers or heads share a choice.
        sequences, prefill, scored: pieces of text, tokens of each that are prefilled, and tokens scored behind them.
        seed: of the search.
    """

    budget: float
    trials: int = 200
    base: KIVIConfig = DEFAULT_BASE
    group_sizes: tuple[int, ...] = (32, 64)
    rotations: tuple[str | None, ...] = (None, "hadamard")
    per_head: bool = False
    groups: int = 12
    sequences: int = 6
    prefill: int = 512
    scored: int = 24
    seed: int = 0

    def candidates(self) -> list[Choice]:
        if self.per_head:
            return choices(self.base)
        return choices(self.base, group_sizes=self.group_sizes, rotations=self.rotations)


@dataclass(frozen=True)
class Point:
    """A setting that was tried: its true bits per value, its loss, and what it was where it is a uniform one."""

    bits: float
    loss: float
    label: str = ""


@dataclass(frozen=True)
class TuningResult:
    """What a search found: the best config under the budget, with all that led to it."""

    settings: TuningSettings
    config: KIVIConfig
    best: Point
    profile: Profile
    trials: tuple[Point, ...]
    uniform: tuple[Point, ...]


def tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, budget: float, **options: Any
) -> KIVIConfig:
    """The best config for ``model`` under ``budget`` true bits per packed value; see [`run`] for the options.

    ```python
    config = kivicache.tune(model, tokenizer, texts, budget=3.5)
    ```
    """
    return run(model, tokenizer, texts, budget=budget, **options).config


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    objective: Objective | None = None,
    storage: str | None = None,
    study_name: str = "kivicache",
    resume: bool = False,
    on_progress: OnProgress = lambda stage, done, total, note: None,
    **settings: Any,
) -> TuningResult:
    """Profile the layers, prune and group their choices, and search the groups.

    Args:
        model, tokenizer: what is tuned.
        texts: calibration texts, joined and cut into pieces.
        objective: a config's loss, less is better. Default: KL to full precision in nats per token on ``texts``.
        storage: a journal file, or a database URL of optuna's, where every trial is kept; None: memory. Several
            processes or machines may work on one study of one storage, each with the same settings.
        study_name: of the study there.
        resume: go on with a study that exists.
        on_progress: told what is done of each of [`STAGES`].
        settings: the fields of [`TuningSettings`].

    Raises:
        ValueError: naming the setting, what was given and what is allowed.
    """
    if missing := [name for name in ("optuna", "sklearn") if find_spec(name) is None]:
        raise ImportError(f'{missing[0]} is not installed; install it with: pip install "kivicache[tune]"')
    chosen = TuningSettings(**settings)
    fidelity = CachedKL(model, calibration(tokenizer, texts, chosen).to(model.device), chosen.prefill, chosen.scored)
    loss: Objective = objective or fidelity
    study = open_study(storage, study_name, chosen.seed, resume)
    _claim(study, chosen, model)
    profile = _profile(study, fidelity, loss, chosen, on_progress)
    uniform = _uniform(study, fidelity, loss, chosen, on_progress)
    groups = cluster(prune(profile), chosen.groups, "loss")
    search(
        study,
        groups,
        lambda assignment: loss(assigned(chosen.base, assignment)),
        chosen.budget,
        chosen.trials,
        lambda done, best: on_progress(STAGES[3], done, chosen.trials, f"best {best:.5f}"),
    )
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.values]
    best = min(done, key=lambda trial: (trial.values[0], trial.values[1]))
    found = chosen_in(groups, best.params)
    return TuningResult(
        settings=chosen,
        config=assigned(chosen.base, expand(groups, found)),
        best=Point(average_bits(groups, found), best.values[0]),
        profile=profile,
        trials=tuple(Point(trial.values[1], trial.values[0]) for trial in done),
        uniform=uniform,
    )


def calibration(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], settings: TuningSettings) -> Tensor:
    """``[sequences, tokens]``: pieces evenly spread over the texts."""
    tokens = torch.tensor(tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"])
    return spread_sequences(tokens, settings.sequences, settings.prefill + settings.scored + 1)


def default_texts() -> list[str]:
    """English prose that every Python carries: its own language reference, which ``help("topics")`` shows."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def dataset_texts(name: str) -> list[str]:
    """Texts of a hub dataset, ``NAME`` or ``NAME:CONFIG``: the ``text`` column of the start of its train split."""
    if find_spec("datasets") is None:
        raise ImportError('datasets is not installed; install it with: pip install "kivicache[eval]"')
    from datasets import load_dataset

    path, _, config = name.partition(":")
    try:
        rows = load_dataset(path, config or None, split="train", streaming=True)
        texts = [row["text"] for row in rows.take(_DATASET_ROWS) if row["text"].strip()]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"dataset {name!r} cannot be read: {error}") from error
    return texts


def _claim(study: Study, settings: TuningSettings, model: PreTrainedModel) -> None:
    """Mark the study as one of these settings, or refuse to mix it with another's."""
    mine = {name: str(value) for name, value in asdict(replace(settings, trials=0, seed=0)).items()}
    mine["model"] = str(model.name_or_path)
    theirs = study.user_attrs.get("settings", mine)
    for name, value in mine.items():
        if theirs[name] != value:
            raise ValueError(f"{name}: got {value}; allowed: {theirs[name]}, as in the study that is resumed")
    study.set_user_attr("settings", mine)


def _profile(
    study: Study, fidelity: CachedKL, loss: Objective, settings: TuningSettings, on_progress: OnProgress
) -> Profile:
    """The profile, from the study where it is there, with a loss for every choice that is on its unit's front."""
    stored = study.user_attrs
    if "units" in stored:
        return {_unit(name): _costs(stored[f"profile {name}"]) for name in stored["units"]}
    layers = len(fidelity.layers)
    done = iter(range(1, layers + 1))
    on_progress(STAGES[0], 0, layers, "")
    profile = profile_errors(
        fidelity,
        settings.base,
        settings.candidates(),
        settings.per_head,
        lambda: on_progress(STAGES[0], next(done), layers, ""),
    )
    exact = KIVIConfig.from_dict(settings.base.to_dict() | {"nbits_key": 16, "nbits_value": 16})
    fronts = [(unit, choice) for unit, front in prune(profile).items() for choice in front]
    for count, (unit, choice) in enumerate(fronts):
        on_progress(STAGES[1], count, len(fronts), "")
        measured = replace(profile[unit][choice], loss=loss(assigned(exact, {unit: choice})))
        profile[unit][choice] = measured
    on_progress(STAGES[1], len(fronts), len(fronts), "")
    for unit, costs in profile.items():
        study.set_user_attr(f"profile {unit}", [[asdict(choice), asdict(cost)] for choice, cost in costs.items()])
    study.set_user_attr("units", [str(unit) for unit in profile])
    return profile


def _unit(name: str) -> Unit:
    layer_idx, head = name.strip("()").split(", ")
    return int(layer_idx), None if head == "None" else int(head)


def _costs(stored: Sequence[Any]) -> dict[Choice, Sensitivity]:
    return {Choice(**choice): Sensitivity(**cost) for choice, cost in stored}


def _uniform(
    study: Study, fidelity: CachedKL, loss: Objective, settings: TuningSettings, on_progress: OnProgress
) -> tuple[Point, ...]:
    """Every choice for all layers alike, up to one bit above the budget: what the search is to be compared with."""
    if "uniform" in study.user_attrs:
        return tuple(Point(**point) for point in study.user_attrs["uniform"])
    points = []
    candidates = settings.candidates()
    for count, choice in enumerate(candidates):
        on_progress(STAGES[2], count, len(candidates), "")
        config = assigned(settings.base, {(layer_idx, None): choice for layer_idx in fidelity.layers})
        bits = fidelity.layer(fidelity.layers[0], config.layer(fidelity.layers[0])).memory().packed_bits_per_value
        if bits <= settings.budget + 1:
            points.append(Point(bits, loss(config), str(choice)))
    on_progress(STAGES[2], len(candidates), len(candidates), "")
    study.set_user_attr("uniform", [asdict(point) for point in points])
    return tuple(points)
