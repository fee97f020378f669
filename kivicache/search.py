"""The search for bits: pruning, grouping and NSGA-II of KVTuner (arXiv 2502.04420, section 5), warm-started.

Everything here is arithmetic on a [`Profile`] and a loss that the caller brings; no model is seen.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kivicache.sensitivity import Choice, Profile, Sensitivity, Unit

if TYPE_CHECKING:
    from optuna.storages import JournalStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

Assignment = dict[Unit, Choice]
POPULATION = 20
EPSILON = 1e-9  # bits: sums of floats are not exact


@dataclass(frozen=True)
class Group:
    """Units that share one choice.

    Attributes:
        values: how many values they cache together.
        bits: choice -> true bits per value.
        loss: choice -> the sum of the losses where one unit alone is packed.
    """

    units: tuple[Unit, ...]
    values: int
    bits: Mapping[Choice, float]
    loss: Mapping[Choice, float]


def prune(profile: Profile, measure: str = "e_o", always: Collection[Choice] = ()) -> Profile:
    """Keep each unit's Pareto front of true bits against ``measure``: what none beats in both; of equals, one.

    Args:
        always: kept beside it, whatever its errors.
    """
    return {
        unit: _front(costs, measure) | {choice: costs[choice] for choice in always if choice in costs}
        for unit, costs in profile.items()
    }


def _front(costs: Mapping[Choice, Sensitivity], measure: str) -> dict[Choice, Sensitivity]:
    front: dict[Choice, Sensitivity] = {}
    best = float("inf")
    for choice, cost in sorted(costs.items(), key=lambda item: (item[1].bits, getattr(item[1], measure))):
        if getattr(cost, measure) < best:
            best = getattr(cost, measure)
            front[choice] = cost
    return front


def cluster(profile: Profile, groups: int, measure: str = "e_o") -> list[Group]:
    """Group the units: first by identical candidates, then by the vectors of ``measure`` over these.

    Args:
        profile: pruned, every ``loss`` measured.
        groups: about this many: each set of candidates gets its share, rounded, and one at least.
    """
    from sklearn.cluster import AgglomerativeClustering

    by_candidates: dict[frozenset[Choice], list[Unit]] = {}
    for unit, costs in profile.items():
        by_candidates.setdefault(frozenset(costs), []).append(unit)
    found = []
    for candidates, units in by_candidates.items():
        wanted = min(max(round(groups * len(units) / len(profile)), 1), len(units))
        labels = [0] * len(units)
        if wanted > 1:
            vectors = [
                [getattr(profile[unit][choice], measure) for choice in sorted(candidates, key=str)] for unit in units
            ]
            labels = AgglomerativeClustering(wanted).fit_predict(vectors)
        for label in sorted(set(labels)):
            found.append(_group([u for u, own in zip(units, labels, strict=True) if own == label], profile))
    return found


def _group(units: Sequence[Unit], profile: Profile) -> Group:
    costs = [profile[unit] for unit in units]
    values = sum(next(iter(cost.values())).values for cost in costs)
    bits = {choice: sum(cost[choice].bits * cost[choice].values for cost in costs) / values for choice in costs[0]}
    loss = {choice: sum(cost[choice].loss or 0.0 for cost in costs) for choice in costs[0]}
    return Group(tuple(units), values, bits, loss)


def average_bits(groups: Sequence[Group], chosen: Sequence[Choice]) -> float:
    """Mean true bits per value over all units."""
    total = sum(group.values * group.bits[choice] for group, choice in zip(groups, chosen, strict=True))
    return total / sum(group.values for group in groups)


def fewest(groups: Sequence[Group]) -> list[Choice]:
    """The choice of fewest bits in every group."""
    return [min(group.bits, key=lambda choice: (group.bits[choice], group.loss[choice])) for group in groups]


def filled(groups: Sequence[Group], chosen: Sequence[Choice], budget: float) -> tuple[Choice, ...]:
    """``chosen`` with better choices while any fits under the budget, each time the one that gains most per bit.

    The losses are taken to add up over the groups, which they nearly do while they are small.
    """
    now = list(chosen)
    while True:
        room = budget - average_bits(groups, now) + EPSILON
        gains = [change for change in _changes(groups, now) if change.less_loss > 0 and change.bits <= room]
        if not gains:
            return tuple(now)
        best = max(gains, key=lambda change: change.less_loss / max(change.bits, EPSILON))
        now[best.index] = best.choice


def repaired(groups: Sequence[Group], chosen: Sequence[Choice], budget: float) -> tuple[Choice, ...]:
    """``chosen`` with fewer bits, each time where a bit less costs least, until it fits under the budget."""
    now = list(chosen)
    while average_bits(groups, now) > budget + EPSILON:
        savings = [change for change in _changes(groups, now) if change.bits < 0]
        best = min(savings, key=lambda change: change.less_loss / change.bits)
        now[best.index] = best.choice
    return tuple(now)


@dataclass(frozen=True)
class _Change:
    """Another choice for one group: what it adds to the average bits, and takes from the loss."""

    index: int
    choice: Choice
    bits: float
    less_loss: float


def _changes(groups: Sequence[Group], chosen: Sequence[Choice]) -> Iterator[_Change]:
    values = sum(group.values for group in groups)
    for index, (group, now) in enumerate(zip(groups, chosen, strict=True)):
        for choice in group.bits:
            bits = group.values * (group.bits[choice] - group.bits[now]) / values
            yield _Change(index, choice, bits, group.loss[now] - group.loss[choice])


def seeds(groups: Sequence[Group], budget: float) -> list[tuple[Choice, ...]]:
    """Where the search starts: up from the fewest bits and from the uniform settings that fit, down from the most, and
    those uniform settings themselves."""
    everywhere = set.intersection(*(set(group.bits) for group in groups))
    uniform = [(choice,) * len(groups) for choice in sorted(everywhere, key=str)]
    fitting = [chosen for chosen in uniform if average_bits(groups, chosen) <= budget + EPSILON]
    most = [max(group.bits, key=lambda choice: (group.bits[choice], -group.loss[choice])) for group in groups]
    up = [filled(groups, chosen, budget) for chosen in (fewest(groups), *fitting)]
    return list(dict.fromkeys([up[0], repaired(groups, most, budget), *up[1:], *fitting]))


def unseen(
    groups: Sequence[Group], chosen: Sequence[Choice], seen: Collection[tuple[Choice, ...]], budget: float
) -> tuple[Choice, ...] | None:
    """``chosen``, or where it is among ``seen`` a setting that is not: its best neighbour, or else one of another's.

    A neighbour has another choice for one group, and is repaired. So any setting comes down to the fewest bits from
    neighbour to neighbour, and None says that all that fit under the budget have been seen.
    """
    chosen = tuple(chosen)
    if chosen not in seen:
        return chosen
    for start in (chosen, *seen):
        neighbours = {
            repaired(groups, [*start[: change.index], change.choice, *start[change.index + 1 :]], budget): None
            for change in _changes(groups, start)
        }
        if fresh := [neighbour for neighbour in neighbours if neighbour not in seen]:
            return min(fresh, key=lambda own: sum(g.loss[c] for g, c in zip(groups, own, strict=True)))
    return None


def search(
    study: Study,
    groups: Sequence[Group],
    loss: Callable[[Assignment], float],
    budget: float,
    trials: int,
    on_trial: Callable[[int, float], object] = lambda done, best: None,
) -> None:
    """Measure settings until the study, which other processes may work on too, has ``trials`` different ones.

    What NSGA-II suggests over the budget is repaired, and what has been measured makes way for a neighbour. Either
    becomes a trial of its own, so that the next generation descends from what was measured. The search ends early
    where all settings under the budget have been measured.

    Raises:
        ValueError: where even the fewest bits are over the budget, or a loss is no finite number.
    """
    from optuna.trial import TrialState

    check_budget(budget, average_bits(groups, fewest(groups)))
    # what a run had begun when it was stopped has failed, or seems to run for ever: it is tried again
    there = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.WAITING))
    queued = [trial.system_attrs.get("fixed_params") for trial in there]
    for chosen in seeds(groups, budget):
        if _params(chosen) not in queued:
            study.enqueue_trial(_params(chosen))
    while len(done := tried(study)) < trials:
        trial = study.ask()
        suggested = tuple(_suggest(trial, index, group) for index, group in enumerate(groups))
        seen = dict.fromkeys(_chosen(groups, names) for names in done)
        fresh = unseen(groups, repaired(groups, suggested, budget), seen, budget)
        if fresh != suggested:
            study.tell(trial, state=TrialState.FAIL)
            if fresh is None:
                return
            study.enqueue_trial(_params(fresh))
            continue
        assignment = expand(groups, fresh)
        trial.set_user_attr("choices", [str(choice) for choice in assignment.values()])
        try:
            measured = finite(loss(assignment))
        except BaseException:  # also Ctrl-C: no trial is left that seems to run
            study.tell(trial, state=TrialState.FAIL)
            raise
        study.tell(trial, (measured, average_bits(groups, fresh)))
        done = tried(study)
        on_trial(len(done), min(own.values[0] for own in done.values()))


def tried(study: Study) -> dict[tuple[str, ...], FrozenTrial]:
    """Every setting that was measured, as its units' choices, and its trial.

    Each unit's, as groups are a matter of how the search was set up.
    """
    from optuna.trial import TrialState

    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {tuple(trial.user_attrs["choices"]): trial for trial in finished}


def check_budget(budget: float, least: float) -> None:
    """Refuse a budget below the fewest true bits that there are."""
    if least > budget + EPSILON:
        raise ValueError(f"budget: got {budget}; allowed: at least {least:.3f}, the fewest true bits per value")


def finite(loss: float) -> float:
    """The loss, or an error where it is no number that can be compared."""
    if not math.isfinite(loss):
        raise ValueError(f"objective: got {loss}; allowed: a finite loss for every setting")
    return loss


def expand(groups: Sequence[Group], chosen: Sequence[Choice]) -> Assignment:
    """Every unit's choice, in the order of the units."""
    of_unit = {unit: choice for group, choice in zip(groups, chosen, strict=True) for unit in group.units}
    return {unit: of_unit[unit] for unit in _units(groups)}


def best_of(study: Study, groups: Sequence[Group]) -> tuple[Assignment, float, float]:
    """The setting of least loss that was tried: every unit's choice, the loss, and the bits."""
    names, trial = min(tried(study).items(), key=lambda item: item[1].values)
    by_name = {str(choice): choice for group in groups for choice in group.bits}
    return dict(zip(_units(groups), map(by_name.__getitem__, names), strict=True)), *trial.values


def open_study(storage: str | None, name: str, seed: int | None, resume: bool) -> Study:
    """A study in a database URL of optuna's, or else in a journal file that processes and machines can share.

    None: in memory.

    Raises:
        ValueError: where there is such a study already and ``resume`` does not say to go on with it, or the storage
            cannot be opened.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    place: Any = storage
    try:
        if storage is not None and "://" not in storage:
            place = _journal(storage)
        study = optuna.create_study(
            storage=place, study_name=name, directions=["minimize", "minimize"], load_if_exists=resume
        )
    except optuna.exceptions.DuplicatedStudyError as error:
        raise ValueError(
            f"storage: {storage} has a study {name!r} already; allowed: resume it, or name another"
        ) from error
    except Exception as error:  # each kind of storage has its own errors
        raise ValueError(f"storage: {storage} cannot be opened: {str(error).splitlines()[0]}") from error
    if seed is not None:
        seed = (seed + 1000 * len(study.trials)) % 2**32  # what is resumed would else suggest the same once more
    study.sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    return study


def _journal(path: str) -> JournalStorage:
    """A journal file, less a last line that a killed process left half: what is appended would be lost with it."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    backend, lock = JournalFileBackend(path), JournalFileSymlinkLock(path)
    lock.acquire()  # or it might be the line that another process is about to write
    try:
        text = Path(path).read_bytes()
        if not b'{"op_code"'.startswith(text[:10]):
            raise ValueError("it is no journal of optuna's")
        if not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)
    finally:
        lock.release()
    return JournalStorage(backend)


def _units(groups: Sequence[Group]) -> list[Unit]:
    return sorted((unit for group in groups for unit in group.units), key=lambda unit: (unit[0], unit[1] or 0))


def _chosen(groups: Sequence[Group], names: Sequence[str]) -> tuple[Choice, ...]:
    """Each group's choice in a setting that was tried."""
    of_unit = dict(zip(_units(groups), names, strict=True))
    return tuple({str(choice): choice for choice in group.bits}[of_unit[group.units[0]]] for group in groups)


def _suggest(trial: Trial, index: int, group: Group) -> Choice:
    by_name = {str(choice): choice for choice in group.bits}
    return by_name[trial.suggest_categorical(_name(index), list(by_name))]


def _params(chosen: Sequence[Choice]) -> dict[str, str]:
    return {_name(index): str(choice) for index, choice in enumerate(chosen)}


def _name(index: int) -> str:
    return f"group_{index:02d}"
