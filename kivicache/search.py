"""The search for bits: pruning, grouping and NSGA-II of KVTuner (arXiv 2502.04420, section 5), warm-started.

Everything here is arithmetic on a [`Profile`] and a loss that the caller brings; no model is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kivicache.sensitivity import Choice, Profile, Sensitivity, Unit

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial

Assignment = dict[Unit, Choice]
POPULATION = 20
_PATIENCE = 20  # trials of all kinds per finished one: a tight budget leaves few that fit


@dataclass(frozen=True)
class Group:
    """Units that share one choice, and what each choice costs them: mean true bits, and the sum of their losses."""

    units: tuple[Unit, ...]
    bits: Mapping[Choice, float]
    loss: Mapping[Choice, float]


def prune(profile: Profile, measure: str = "e_o") -> Profile:
    """Keep each unit's Pareto front of true bits against ``measure``: what no other choice beats or equals in both."""
    return {unit: _front(costs, measure) for unit, costs in profile.items()}


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
        groups: at most this many, unless there are more sets of candidates than that.
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
    bits = {choice: sum(cost[choice].bits for cost in costs) / len(units) for choice in costs[0]}
    loss = {choice: sum(cost[choice].loss or 0.0 for cost in costs) for choice in costs[0]}
    return Group(tuple(units), bits, loss)


def average_bits(groups: Sequence[Group], chosen: Sequence[Choice]) -> float:
    """Mean true bits per value over all units."""
    total = sum(len(group.units) * group.bits[choice] for group, choice in zip(groups, chosen, strict=True))
    return total / sum(len(group.units) for group in groups)


def greedy(groups: Sequence[Group]) -> list[tuple[Choice, ...]]:
    """From the fewest bits of every group to the least loss, one upgrade at a time, the one that gains most per bit.

    The losses are taken to add up over the groups, which they do while they are small.
    """
    chosen = [min(group.bits, key=lambda choice: (group.bits[choice], group.loss[choice])) for group in groups]
    path = [tuple(chosen)]
    while True:
        gains = []
        for idx, group in enumerate(groups):
            now = chosen[idx]
            for choice in group.bits:
                cost = len(group.units) * (group.bits[choice] - group.bits[now])
                gain = group.loss[now] - group.loss[choice]
                if cost > 0 and gain > 0:
                    gains.append((gain / cost, idx, choice))
        if not gains:
            return path
        _, idx, choice = max(gains, key=lambda upgrade: upgrade[0])
        chosen[idx] = choice
        path.append(tuple(chosen))


def seeds(groups: Sequence[Group], budget: float) -> list[tuple[Choice, ...]]:
    """Where the search starts: the greedy solutions under the budget, each filled up to it, and the uniform ones."""
    path = [chosen for chosen in greedy(groups) if average_bits(groups, chosen) <= budget]
    filled = [_filled(groups, chosen, budget) for chosen in reversed(path)]
    everywhere = set.intersection(*(set(group.bits) for group in groups))
    uniform = [(choice,) * len(groups) for choice in sorted(everywhere, key=str)]
    feasible = [chosen for chosen in uniform if average_bits(groups, chosen) <= budget]
    return list(dict.fromkeys([*filled[:POPULATION], *feasible]))


def _filled(groups: Sequence[Group], chosen: Sequence[Choice], budget: float) -> tuple[Choice, ...]:
    """``chosen`` with the best upgrades that still fit under the budget."""
    now = list(chosen)
    while True:
        upgrades = [
            (group.loss[now[idx]] - group.loss[choice], idx, choice)
            for idx, group in enumerate(groups)
            for choice in group.bits
            if group.loss[choice] < group.loss[now[idx]]
            and average_bits(groups, [*now[:idx], choice, *now[idx + 1 :]]) <= budget
        ]
        if not upgrades:
            return tuple(now)
        _, idx, choice = max(upgrades, key=lambda upgrade: upgrade[0])
        now[idx] = choice


def search(
    study: Study,
    groups: Sequence[Group],
    loss: Callable[[Assignment], float],
    budget: float,
    trials: int,
    on_trial: Callable[[int, float], object] = lambda done, best: None,
) -> None:
    """Run trials until the study, which other processes may work on too, has ``trials`` finished ones.

    A trial over the budget is stored as pruned, and its loss is not measured; nor is that of a choice tried before.

    Raises:
        ValueError: where even the fewest bits are over the budget.
    """
    from optuna.exceptions import TrialPruned
    from optuna.trial import TrialState

    least = average_bits(groups, greedy(groups)[0])
    if least > budget:
        raise ValueError(
            f"budget: got {budget}; allowed: at least {least:.3f} true bits per value, the fewest there are"
        )
    if not study.trials:
        for chosen in seeds(groups, budget):
            names = {_name(i): str(choice) for i, choice in enumerate(chosen)}
            study.enqueue_trial(names, skip_if_exists=True)

    def objective(trial: Trial) -> tuple[float, float]:
        chosen = [_suggest(trial, i, group) for i, group in enumerate(groups)]
        bits = average_bits(groups, chosen)
        trial.set_user_attr("bits", bits)
        if bits > budget:
            raise TrialPruned(f"{bits:.3f} bits")
        for other in finished():
            if other.params == trial.params:
                return other.values[0], bits
        return loss(expand(groups, chosen)), bits

    def finished() -> list[Any]:
        return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    while len(finished()) < trials and len(study.get_trials(deepcopy=False)) < _PATIENCE * trials:
        study.optimize(objective, n_trials=1)
        done = finished()
        if done:
            on_trial(len(done), min(trial.values[0] for trial in done))


def expand(groups: Sequence[Group], chosen: Sequence[Choice]) -> Assignment:
    """Every unit's choice."""
    return {unit: choice for group, choice in zip(groups, chosen, strict=True) for unit in group.units}


def chosen_in(groups: Sequence[Group], params: Mapping[str, str]) -> list[Choice]:
    """The choices that a stored trial stands for."""
    return [{str(c): c for c in group.bits}[params[_name(i)]] for i, group in enumerate(groups)]


def open_study(storage: str | None, name: str, seed: int | None, resume: bool) -> Study:
    """A study in a database URL of optuna's, or else in a journal file that processes and machines can share.

    None: in memory.

    Raises:
        ValueError: where there is such a study already and ``resume`` does not say to go on with it.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    place: Any = storage
    if storage is not None and "://" not in storage:
        place = JournalStorage(JournalFileBackend(storage))
    sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    try:
        return optuna.create_study(
            storage=place,
            study_name=name,
            sampler=sampler,
            directions=["minimize", "minimize"],
            load_if_exists=resume,
        )
    except optuna.exceptions.DuplicatedStudyError as error:
        raise ValueError(
            f"storage: {storage} has a study {name!r} already; allowed: resume it, or name another"
        ) from error


def _suggest(trial: Trial, index: int, group: Group) -> Choice:
    by_name = {str(choice): choice for choice in group.bits}
    return by_name[trial.suggest_categorical(_name(index), list(by_name))]


def _name(index: int) -> str:
    return f"group_{index:02d}"
