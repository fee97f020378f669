"""Pruning, grouping and the search, on made-up costs, against brute force."""

import itertools
import random

import pytest

from kivicache.search import (
    Group,
    average_bits,
    best_of,
    cluster,
    expand,
    fewest,
    filled,
    open_study,
    prune,
    repaired,
    search,
    seeds,
    tried,
)
from kivicache.sensitivity import Choice, Sensitivity

CHOICES = [Choice(key, value, 32) for key in (2, 4, 8) for value in (2, 4, 8)]


def cost(choice, error, loss=None, values=100):
    return Sensitivity((choice.nbits_key + choice.nbits_value) / 2 + 1, values, 0.1, 0.1, 0.1, error, loss)


def random_groups(count, choices=4):
    """Groups of different sizes, whose losses fall with the bits in steps of their own."""
    groups = []
    for i in range(count):
        own = random.sample(CHOICES, choices)
        loss = {choice: random.random() * 2.0 ** -(choice.nbits_key + choice.nbits_value) for choice in own}
        bits = {choice: cost(choice, 0).bits for choice in own}
        groups.append(Group(((i, None),), random.choice([100, 200, 300]), bits, loss))
    return groups


def everything(groups, budget):
    """All settings under the budget."""
    for chosen in itertools.product(*(group.bits for group in groups)):
        values = sum(group.values for group in groups)
        bits = sum(g.values * g.bits[c] for g, c in zip(groups, chosen, strict=True)) / values
        if bits <= budget + 1e-9:
            yield chosen


def loss_of(groups, chosen):
    return sum(group.loss[choice] for group, choice in zip(groups, chosen, strict=True))


def middle(groups):
    """A budget that about half of all settings fit."""
    bits = sorted(average_bits(groups, chosen) for chosen in everything(groups, 99))
    return bits[len(bits) // 2]


def test_prune_keeps_what_no_other_choice_beats():
    errors = {choice: random.choice([0.1, 0.2, 0.3, 0.4, 0.5]) for choice in CHOICES}
    costs = {choice: cost(choice, error) for choice, error in errors.items()}
    [kept] = prune({(0, None): costs}).values()
    for choice, own in costs.items():
        beaten = any(
            other.bits <= own.bits and other.e_o <= own.e_o and (other.bits, other.e_o) != (own.bits, own.e_o)
            for other in costs.values()
        )
        twins = [kept.get(c) for c, other in costs.items() if (other.bits, other.e_o) == (own.bits, own.e_o)]
        assert sum(twin is not None for twin in twins) == (0 if beaten else 1), choice


def test_prune_keeps_what_it_is_told_to_keep_where_a_unit_has_it():
    profile = {
        (0, None): {choice: cost(choice, choice.nbits_value) for choice in CHOICES},
        (1, None): {CHOICES[0]: cost(CHOICES[0], 0.1)},
    }
    kept = prune(profile, always=[CHOICES[-1]])
    assert set(kept[0, None]) == {*prune(profile)[0, None], CHOICES[-1]}
    assert CHOICES[-1] not in prune(profile)[0, None] and set(kept[1, None]) == {CHOICES[0]}


def test_cluster_finds_planted_groups():
    kinds = {"low": 0.1, "middle": 1.0, "high": 2.0}
    planted = {(i, None): random.choice(list(kinds)) for i in range(20)}
    planted |= {(20 + i, None): kind for i, kind in enumerate(kinds)}
    profile = {
        unit: {c: cost(c, 0.1, kinds[kind] * random.uniform(0.95, 1.05) / c.nbits_key) for c in CHOICES}
        for unit, kind in planted.items()
    }
    groups = cluster(profile, 3, "loss")
    assert sorted(sorted(group.units) for group in groups) == sorted(
        sorted(unit for unit, own in planted.items() if own == kind) for kind in kinds
    )
    for group in groups:
        assert group.values == 100 * len(group.units)
        for choice in CHOICES:
            assert group.loss[choice] == pytest.approx(sum(profile[unit][choice].loss for unit in group.units))


def test_cluster_never_mixes_units_of_different_candidates():
    profile = {
        (i, None): {choice: cost(choice, 0.1, random.random()) for choice in CHOICES[: 3 + i % 2]} for i in range(8)
    }
    groups = cluster(profile, 2, "loss")
    assert len(groups) == 2
    assert [len({unit[0] % 2 for unit in group.units}) for group in groups] == [1, 1]


def test_a_group_weighs_as_many_values_as_its_units_cache():
    few, many = cost(CHOICES[0], 0.1, 0.5, values=10), cost(CHOICES[-1], 0.1, 0.5, values=90)
    groups = cluster({(0, None): {CHOICES[0]: few}, (1, None): {CHOICES[-1]: many}}, 2, "loss")
    assert average_bits(groups, fewest(groups)) == pytest.approx((10 * few.bits + 90 * many.bits) / 100)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_filled_leaves_no_single_gain_that_fits(count):
    groups = random_groups(count)
    budget = middle(groups)
    result = filled(groups, fewest(groups), budget)
    assert average_bits(groups, result) <= budget + 1e-9
    for other in everything(groups, budget):
        if sum(a != b for a, b in zip(other, result, strict=True)) == 1:
            assert loss_of(groups, other) >= loss_of(groups, result)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_repaired_fits_and_leaves_alone_what_fits(count):
    groups = random_groups(count)
    budget = middle(groups)
    for chosen in itertools.product(*(group.bits for group in groups)):
        result = repaired(groups, chosen, budget)
        assert average_bits(groups, result) <= budget + 1e-9
        if average_bits(groups, chosen) <= budget:
            assert result == chosen
        else:
            assert average_bits(groups, result) < average_bits(groups, chosen)


def test_the_uniform_settings_that_fit_are_among_the_seeds():
    groups = [
        Group(((i, None),), 1, {c: cost(c, 0).bits for c in CHOICES}, dict.fromkeys(CHOICES, 0.0)) for i in range(3)
    ]
    budget = 4.0
    fitting = {(choice,) * 3 for choice in CHOICES if cost(choice, 0).bits <= budget}
    assert fitting and fitting <= set(seeds(groups, budget))
    assert all(average_bits(groups, chosen) <= budget for chosen in seeds(groups, budget))


def interacting(groups):
    """A loss that does not add up: some pairs of choices are worse, or better, together."""
    extra = {}

    def loss(chosen):
        together = 0.0
        for pair in itertools.combinations(enumerate(chosen), 2):
            together += extra.setdefault(pair, random.uniform(-0.3, 0.3))
        return loss_of(groups, chosen) * (1.5 + together)

    return loss


def test_search_comes_near_to_what_trying_everything_finds():
    groups = random_groups(4)
    budget, loss = middle(groups), interacting(groups)
    allowed, asked = list(everything(groups, budget)), []

    def measured(assignment):
        chosen = tuple(assignment[group.units[0]] for group in groups)
        asked.append(chosen)
        return loss(chosen)

    study = open_study(None, "study", seed=random.randrange(1000), resume=False)
    search(study, groups, measured, budget, trials=60)
    found, least, bits = best_of(study, groups)
    assert set(asked) <= set(allowed)
    assert len(asked) == len(set(asked)) == len(tried(study)) == 60  # a trial is a setting that is new
    found = tuple(found[group.units[0]] for group in groups)
    assert (loss(found), average_bits(groups, found)) == (least, bits)
    assert least <= min(map(loss, seeds(groups, budget)))
    assert least <= sorted(map(loss, allowed))[len(allowed) // 30]  # nearly the best of all, which the seeds are not


@pytest.mark.parametrize("count", [1, 2, 3])
def test_search_ends_where_all_that_fits_is_measured(count):
    groups = random_groups(count)
    budget, asked = middle(groups), []

    def loss(assignment):
        asked.append(tuple(assignment.values()))
        return random.random()

    study = open_study(None, "study", seed=0, resume=False)
    search(study, groups, loss, budget, trials=1000)
    assert sorted(map(str, asked)) == sorted(map(str, everything(groups, budget)))
    assert best_of(study, groups)[1] == min(trial.values[0] for trial in tried(study).values())


def test_a_trial_means_what_was_measured_however_units_are_grouped():
    units = {(layer, None): dict.fromkeys(CHOICES, 0.1) for layer in range(12)}
    bits = {choice: cost(choice, 0).bits for choice in CHOICES}

    def grouped(*parts):
        return [Group(tuple(part), len(part), bits, dict.fromkeys(CHOICES, 1.0)) for part in parts]

    losses = {}

    def loss(assignment):
        value = random.random()
        losses[value] = assignment
        return value

    order = random.sample(sorted(units), 12)
    study = open_study(None, "study", seed=0, resume=False)
    search(study, grouped(order[:5], order[5:]), loss, 16.0, trials=9)
    found, least, _ = best_of(study, grouped(order[:2], order[2:8], order[8:]))
    assert least == min(losses) and found == losses[least]


def test_search_says_which_budget_is_too_small():
    groups = random_groups(2)
    least = average_bits(groups, fewest(groups))
    with pytest.raises(ValueError, match=rf"budget: got {least - 0.01}; allowed: at least {least:.3f}"):
        search(open_study(None, "s", 0, False), groups, lambda _: 0.0, least - 0.01, 5)


def test_a_study_goes_on_only_where_it_is_resumed(tmp_path):
    groups, storage = random_groups(3), str(tmp_path / "trials.journal")
    budget, calls = middle(groups), []

    def loss(assignment):
        calls.append(tuple(assignment.values()))
        return random.random()

    search(open_study(storage, "mine", 0, resume=False), groups, loss, budget, trials=6)
    with pytest.raises(ValueError, match=r"storage: .*trials.journal has a study 'mine' already"):
        open_study(storage, "mine", 0, resume=False)
    resumed, before = open_study(storage, "mine", 1, resume=True), list(calls)
    search(resumed, groups, loss, budget, trials=6)
    assert calls == before  # all its trials are there
    search(resumed, groups, loss, budget, trials=9)
    assert len(calls) == len(set(calls))
    assert len([trial for trial in resumed.trials if trial.values]) == 9


@pytest.mark.parametrize("killed_at", [-1, -20])
def test_a_line_that_a_killed_process_left_half_is_dropped(tmp_path, killed_at):
    groups, path = random_groups(3), tmp_path / "trials.journal"
    budget = middle(groups)
    search(open_study(str(path), "mine", 0, resume=False), groups, lambda _: random.random(), budget, trials=3)
    path.write_bytes(path.read_bytes()[:killed_at])
    resumed = open_study(str(path), "mine", 1, resume=True)
    assert len(tried(resumed)) == 2  # the last line was that of the last trial's end
    search(resumed, groups, lambda _: random.random(), budget, trials=5)
    assert len(tried(open_study(str(path), "mine", 2, resume=True))) == 5


@pytest.mark.parametrize("text", ["half a line", "other\nlines\n"])
def test_a_file_that_is_no_journal_stays_as_it_is(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"storage: .*notes.txt cannot be opened: it is no journal of optuna's"):
        open_study(str(path), "mine", 0, resume=True)
    assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


def test_the_seeds_that_a_stop_left_out_are_tried_when_it_goes_on(tmp_path):
    groups, storage = random_groups(9), str(tmp_path / "trials.journal")
    budget, calls = average_bits(groups, fewest(groups)) + 1, []

    def loss(assignment):
        calls.append(tuple(assignment.values()))
        if len(calls) == 1:
            raise KeyboardInterrupt
        return random.random()

    with pytest.raises(KeyboardInterrupt):
        search(open_study(storage, "mine", 0, resume=False), groups, loss, budget, trials=9)
    search(open_study(storage, "mine", 0, resume=True), groups, loss, budget, trials=9)
    assert set(seeds(groups, budget)) <= set(calls[1:])


def test_a_resumed_study_suggests_other_settings(tmp_path):
    groups, storage = random_groups(12), str(tmp_path / "trials.journal")
    for trials in (10, 20):
        study = open_study(storage, "mine", 0, resume=True)
        search(study, groups, lambda _: random.random(), average_bits(groups, fewest(groups)) + 9, trials)
    drawn = [tuple(t.params.values()) for t in study.trials if "fixed_params" not in t.system_attrs]
    assert len(set(drawn)) == len(drawn) > 8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_search(value):
    groups = random_groups(2)
    with pytest.raises(ValueError, match=f"objective: got {value}; allowed: a finite loss"):
        search(open_study(None, "s", 0, False), groups, lambda _: value, 16.0, 5)


def test_expand_gives_every_unit_the_choice_of_its_group():
    groups = [Group(((0, None), (2, None)), 2, {}, {}), Group(((1, 0), (1, 1)), 2, {}, {})]
    assert expand(groups, CHOICES[:2]) == {
        (0, None): CHOICES[0],
        (2, None): CHOICES[0],
        (1, 0): CHOICES[1],
        (1, 1): CHOICES[1],
    }
