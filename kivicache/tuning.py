"""[`tune`]: a [`KIVIConfig`] for one model, the best under a budget of true bits (KVTuner, arXiv 2502.04420)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kivicache import __version__
from kivicache.config import KIVIConfig
from kivicache.fidelity import text_pieces
from kivicache.models import MissingPackage, fingerprint
from kivicache.objectives import CachedKL
from kivicache.policy import packed_lengths
from kivicache.search import (
    EPSILON,
    Assignment,
    best_of,
    check_budget,
    cluster,
    finite,
    open_study,
    prune,
    search,
    tried,
)
from kivicache.sensitivity import Choice, Profile, Sensitivity, Unit, assigned, choices, profile_errors, unpacked

if TYPE_CHECKING:
    from optuna.study import Study

Objective = Callable[[KIVIConfig], float]
OnProgress = Callable[[str, int, int, str], object]  # (stage, how much of it is done, of how much, a note)
DEFAULT_BASE = KIVIConfig(backend="mse")
STAGES = ("errors by layer", "uniform settings", "loss by layer", "search")
_FROM_1 = ("trials", "groups", "sequences", "profiled", "prefill", "scored")


@dataclass(frozen=True)
class TuningSettings:
    """What is searched, and on how much text.

    Attributes:
        budget: true bits per packed value, scales and minima included, at the most.
        trials: settings that the search tries.
        base: every setting that the search does not choose: all but bits, group sizes and rotations.
        group_sizes, rotations: those that a layer may choose.
        per_head: choose for every kv head. Heads choose bits alone; their layer's group size and rotation stay those
            of ``base``, such as the result of a search by layer, whose bits are chosen anew.
        groups: about as many groups of layers or heads share a choice.
        sequences, prefill, scored: pieces of text, tokens of each that are prefilled, and tokens scored behind them.
        profiled: as many pieces at most profile the layers, which takes most of the time.
        seed: of the search.
    """

    budget: float
    trials: int = 100
    base: KIVIConfig = DEFAULT_BASE
    group_sizes: tuple[int, ...] = (32, 64)
    rotations: tuple[str | None, ...] = (None, "hadamard")
    per_head: bool = False
    groups: int = 12
    sequences: int = 12
    profiled: int = 6
    prefill: int = 512
    scored: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.budget) not in (int, float) or not 2 < self.budget < 16:
            raise ValueError(f"budget: got {self.budget!r}; allowed: a number of bits between 2 and 16")
        for name in _FROM_1:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: got {value!r}; allowed: a whole number from 1")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed!r}; allowed: a whole number from 0 to {2**32 - 1}")
        for name, field in (("group_sizes", "group_size"), ("rotations", "rotation")):
            if not getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)!r}; allowed: at least one {field}")
            for value in getattr(self, name):
                KIVIConfig.from_dict({field: value})
        self._check_base()
        self._check_prefill()

    def _check_base(self) -> None:
        """Refuse what the search would replace without a word."""
        replaced = () if self.per_head else ("nbits_key", "nbits_value", "group_size", "rotation")
        for layer_idx, own in self.base.layers.items():
            for name in replaced:
                if name in own:
                    raise ValueError(
                        f"base: got layers[{layer_idx}].{name}; allowed: layers without {', '.join(replaced)}, which "
                        "the search chooses"
                    )
        if self.base.heads:
            raise ValueError(
                f"base: got heads of layers {sorted(self.base.heads)}; allowed: none, as the search chooses all bits"
            )
        for name, searched in (("group_size", self.group_sizes), ("rotation", self.rotations)):
            value = getattr(self.base, name)
            if name in replaced and value not in (getattr(DEFAULT_BASE, name), *searched):
                raise ValueError(
                    f"base: got {name} {value!r}; allowed: {', '.join(map(repr, searched))}, which are searched"
                )

    def _check_prefill(self) -> None:
        """What packs nothing costs no bits and no loss: the search would take it for the best."""
        others = max(self.base.layers, default=-1) + 1  # stands for every layer without settings of its own
        for layer in map(self.base.layer, (*self.base.layers, others)):
            for choice in (*self.candidates(), *self.uniform()):
                try:
                    packed = packed_lengths(replace(layer, **choice.settings), self.prefill)
                except ValueError as error:
                    raise ValueError(
                        f"group_sizes: got {choice.group_size}; allowed: what base's other settings let {choice} "
                        f"have; {error}"
                    ) from error
                if 0 in packed:
                    raise ValueError(
                        f"prefill: got {self.prefill}; allowed: more tokens, as {choice} packs none of so few beside "
                        f"{layer.sink_length} sinks and a residual of {layer.residual_length}"
                    )

    def candidates(self) -> list[Choice]:
        """What every layer, or every head, may choose."""
        return choices([None], [None]) if self.per_head else self.uniform()

    def uniform(self) -> list[Choice]:
        """The settings for all layers alike that the search is to be compared with."""
        return choices(self.group_sizes, self.rotations)


@dataclass(frozen=True)
class Point:
    """A setting that was tried: its true bits per packed value, its loss, and what it was where it is uniform."""

    bits: float
    loss: float
    label: str = ""


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other has fewer bits and less loss than, from few bits to many."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


@dataclass(frozen=True)
class Measured:
    """What is measured before the search, whatever its budget.

    Attributes:
        profile: every unit's errors under every choice.
        candidates: what the search chooses from, with losses.
        uniform: the settings for all layers alike.
    """

    profile: Profile
    candidates: Profile
    uniform: tuple[Point, ...]


@dataclass(frozen=True)
class TuningResult:
    """What a search found: the best config under the budget, with all that led to it."""

    settings: TuningSettings
    config: KIVIConfig
    best: Point
    measured: Measured
    trials: tuple[Point, ...]


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
    measured: Measured | None = None,
    on_progress: OnProgress = lambda stage, done, total, note: None,
    **settings: Any,
) -> TuningResult:
    """Profile the layers, prune and group their choices, and search the groups.

    Args:
        model, tokenizer: what is tuned.
        texts: calibration texts, joined and cut into pieces.
        objective: a config's loss, less is better. Default: KL to full precision in nats per token on ``texts``.
            A study is resumed with the same one alone, known by its ``name`` or else that of its function or class.
        storage: a journal file, or a database URL of optuna's, where every trial is kept; None: memory. Several
            processes or machines may work on one study of one storage, each with the same settings.
        study_name: of the study there.
        resume: go on with a study that exists.
        measured: of another result that differs in budget, trials, groups or seed alone. None: measured now, and kept
            in the study as it goes.
        on_progress: told what is done of each of [`STAGES`].
        settings: the fields of [`TuningSettings`].

    Raises:
        ValueError: naming the setting, what was given and what is allowed.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts: got the text {texts[:40]!r}; allowed: several texts, such as a list")
    if missing := [name for name in ("optuna", "sklearn") if find_spec(name) is None]:
        raise MissingPackage(missing[0], 'pip install "kivicache[tune]"')
    if unknown := sorted(set(settings) - {field.name for field in fields(TuningSettings)}):
        allowed = ", ".join(field.name for field in fields(TuningSettings))
        raise ValueError(f"{unknown[0]}: unknown setting; allowed: {allowed}")
    chosen = TuningSettings(**settings)
    texts, profiled = list(texts), min(chosen.profiled, chosen.sequences)
    tokens = [calibration(tokenizer, texts, chosen, count) for count in (chosen.sequences, profiled)]
    whole, part = (CachedKL(model, own.to(model.device), chosen.prefill, chosen.scored) for own in tokens)
    loss: Objective = objective or whole
    check_budget(chosen.budget, _fewest_bits(part, chosen))
    study = open_study(storage, study_name, chosen.seed, resume)
    _claim(study, _origin(chosen, model, tokens[0], objective))
    measured = measured or _measured(study, whole, part, objective, chosen, on_progress)
    groups = cluster(measured.candidates, chosen.groups, "loss")
    search(
        study,
        groups,
        lambda assignment: loss(assigned(chosen.base, assignment)),
        chosen.budget,
        chosen.trials,
        lambda done, best: on_progress(STAGES[3], min(done, chosen.trials), chosen.trials, f"best {best:.5f}"),
    )
    trials = tuple(Point(trial.values[1], trial.values[0]) for trial in tried(study).values())
    if len(trials) < chosen.trials:
        on_progress(STAGES[3], len(trials), len(trials), "no other setting fits")
    assignment, least, bits = best_of(study, groups)
    best = Point(bits, least)
    # one may be none of the search's: heads choose bits alone, and the first trials may be its last
    for choice, point in zip(chosen.uniform(), measured.uniform, strict=True):
        if point.bits <= chosen.budget + EPSILON and point.loss < best.loss:
            assignment, best = _everywhere(whole, choice), Point(point.bits, point.loss)
    return TuningResult(chosen, assigned(chosen.base, assignment), best, measured, trials)


def calibration(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], settings: TuningSettings, sequences: int
) -> Tensor:
    """``[sequences, tokens]``: pieces evenly spread over the texts."""
    return text_pieces(tokenizer, "\n\n".join(texts), sequences, settings.prefill + settings.scored + 1)


def _fewest_bits(fidelity: CachedKL, settings: TuningSettings) -> float:
    """The fewest true bits per packed value that there are: all layers at 2 bits."""
    configs = (
        assigned(settings.base, _everywhere(fidelity, choice))
        for choice in settings.candidates()
        if choice.pair == "K2V2"
    )
    return min(fidelity.cache(config).memory().packed_bits_per_value for config in configs)


def default_texts() -> list[str]:
    """What every Python carries: its own language reference, as ``help("topics")`` shows it."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _measured(
    study: Study,
    whole: CachedKL,
    part: CachedKL,
    objective: Objective | None,
    settings: TuningSettings,
    on_progress: OnProgress,
) -> Measured:
    """The profile, the uniform settings, and the loss of all that is not pruned; the study keeps what is done."""
    profile = _errors(study, part, settings, on_progress)
    uniform = _uniform(study, whole, objective or whole, settings, on_progress)
    best = {point.label for point in front(uniform)}
    # what is best for all units alike is a candidate for each, however it is judged by the unit's own errors
    candidates = prune(profile, always=[choice for choice in settings.uniform() if str(choice) in best])
    return Measured(profile, _losses(study, candidates, objective or part, settings, on_progress), uniform)


def _errors(study: Study, fidelity: CachedKL, settings: TuningSettings, on_progress: OnProgress) -> Profile:
    layers, by_name = fidelity.layers, {str(choice): choice for choice in settings.candidates()}

    def plain(profile: Profile) -> list[Any]:
        return [
            [head, [[str(choice), astuple(cost)] for choice, cost in costs.items()]]
            for (_, head), costs in profile.items()
        ]

    def kept(layer_idx: int, measure: Callable[[], Profile]) -> Profile:
        stored = _kept(study, f"errors {layer_idx}", lambda: plain(measure()))
        on_progress(STAGES[0], layers.index(layer_idx) + 1, len(layers), "")
        return {
            (layer_idx, head): {by_name[name]: Sensitivity(*cost) for name, cost in costs} for head, costs in stored
        }

    on_progress(STAGES[0], 0, len(layers), "")
    return profile_errors(fidelity, settings.base, settings.candidates(), settings.per_head, kept)


def _uniform(
    study: Study, fidelity: CachedKL, loss: Objective, settings: TuningSettings, on_progress: OnProgress
) -> tuple[Point, ...]:
    def measure(choice: Choice) -> tuple[float, float]:
        config = assigned(settings.base, _everywhere(fidelity, choice))
        return fidelity.cache(config).memory().packed_bits_per_value, finite(loss(config))

    points: list[Point] = []
    for choice in settings.uniform():
        bits, measured = _kept(study, f"uniform {choice}", partial(measure, choice))
        points.append(Point(bits, measured, str(choice)))
        on_progress(STAGES[1], len(points), len(settings.uniform()), "")
    return tuple(points)


def _losses(
    study: Study, candidates: Profile, loss: Objective, settings: TuningSettings, on_progress: OnProgress
) -> Profile:
    """``candidates`` with the loss of each where one unit alone is packed."""
    exact, done, total = unpacked(settings.base), 0, sum(map(len, candidates.values()))

    def measure(unit: Unit) -> dict[str, float]:
        losses: dict[str, float] = {}
        for choice in candidates[unit]:
            on_progress(STAGES[2], done + len(losses), total, "")
            losses[str(choice)] = finite(loss(assigned(exact, {unit: choice})))
        return losses

    profile: Profile = {}
    for unit, costs in candidates.items():
        losses = _kept(study, f"losses {unit}", partial(measure, unit))
        profile[unit] = {choice: replace(cost, loss=losses[str(choice)]) for choice, cost in costs.items()}
        done += len(costs)
        on_progress(STAGES[2], done, total, "")
    return profile


def _everywhere(fidelity: CachedKL, choice: Choice) -> Assignment:
    return {(layer_idx, None): choice for layer_idx in fidelity.layers}


def _kept(study: Study, name: str, measure: Callable[[], Any]) -> Any:
    """What the study holds under this name, or else what is measured now, in JSON's types.

    Of two workers that measure the same, the later one takes what the earlier one has stored: with numbers of their
    own they might group the units in two ways.
    """
    if name not in study.user_attrs:
        own = measure()
        if name not in study.user_attrs:
            study.set_user_attr(name, own)
    return study.user_attrs[name]


def _origin(
    settings: TuningSettings, model: PreTrainedModel, tokens: Tensor, objective: Objective | None
) -> dict[str, str]:
    """All that decides the losses of a study."""
    named = getattr(objective, "name", getattr(objective, "__qualname__", type(objective).__qualname__))
    return {name: str(value) for name, value in asdict(replace(settings, trials=1, seed=0)).items()} | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "model": f"{model.name_or_path} with weights {fingerprint(model)}",
        "texts": f"tokens {sha256(tokens.numpy().tobytes()).hexdigest()[:16]}",
        "objective": "KL to full precision" if objective is None else named,
        **{package: version(package) for package in ("torch", "transformers", "scikit-learn")},
        "kivicache": __version__,
    }


def _claim(study: Study, mine: dict[str, str]) -> None:
    """Mark the study as one of these settings, or refuse to mix it with another's."""
    theirs = study.user_attrs.get("settings", mine)
    for name, value in mine.items():
        if theirs.get(name) != value:
            raise ValueError(f"{name}: got {value}; allowed: {theirs.get(name)}, as in the study that is resumed")
    study.set_user_attr("settings", mine)
