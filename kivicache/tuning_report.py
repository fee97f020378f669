"""What a search found, as a table and as pictures."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kivicache.sensitivity import Choice, Unit
from kivicache.tuning import Point, TuningResult

if TYPE_CHECKING:
    from rich.console import Console


def render(result: TuningResult, console: Console) -> None:
    """Print the tuned setting among the uniform ones, by bits, and how often each choice was taken."""
    from rich import box
    from rich.table import Table

    table = Table("setting", "true bits", "loss", "tuned is better by", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    best = result.best
    for point in sorted([*result.uniform, best], key=lambda point: (point.bits, -point.loss)):
        ratio = "" if point is best or best.loss <= 0 else f"{point.loss / best.loss:.2f}x"
        style = "bold green" if point is best else None
        table.add_row(point.label or "tuned", f"{point.bits:.3f}", f"{point.loss:.5f}", ratio, style=style)
    console.print(table)
    taken = Counter(str(choice) for choice in tuned_choices(result).values())
    console.print("taken: " + ", ".join(f"{count} x {choice}" for choice, count in taken.most_common()))


def tuned_choices(result: TuningResult) -> dict[Unit, Choice]:
    """What every layer or head was given."""
    chosen = {}
    for layer_idx, head in result.profile:
        layer = result.config.layer(layer_idx)
        bits = (layer.nbits_key, layer.nbits_value) if head is None else layer.heads[head]
        chosen[layer_idx, head] = Choice(*bits, layer.group_size, layer.rotation)
    return chosen


def front(points: list[Point]) -> list[Point]:
    """The points that no other has fewer bits and less loss than, from few bits to many."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


def plot_front(result: TuningResult, path: str | Path) -> None:
    """Loss against true bits: all trials, their Pareto front, and the uniform settings."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    tried = [point for point in result.trials if point.loss > 0]
    line = front(tried)
    axes.scatter([p.bits for p in tried], [p.loss for p in tried], s=9, color="#b8cfc7", label="trials")
    axes.plot(
        [p.bits for p in line], [p.loss for p in line], ".-", color="#0b6e4f", label="Pareto front of the search"
    )
    uniform = [point for point in result.uniform if point.loss > 0]
    axes.scatter([p.bits for p in uniform], [p.loss for p in uniform], marker="x", color="#b3541e", label="uniform")
    for point in front(uniform):
        axes.annotate(point.label, (point.bits, point.loss), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.scatter([result.best.bits], [result.best.loss], marker="*", s=150, color="#0b6e4f", zorder=3, label="tuned")
    axes.axvline(result.settings.budget, color="#888888", linewidth=0.8, linestyle="--", label="budget")
    axes.set_yscale("log")
    axes.set_xlabel("true bits per packed value, scales and minima included")
    axes.set_ylabel("loss (less is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_sensitivity(result: TuningResult, path: str | Path) -> None:
    """A heat map of the attention output's error e_o by layer (or head) and pair, without rotation, on a log scale."""
    pyplot = _pyplot()
    units = list(result.profile)
    plain = [
        choice
        for choice in result.profile[units[0]]
        if choice.group_size == result.settings.base.group_size and choice.rotation == result.settings.base.rotation
    ]
    pairs = sorted(plain, key=lambda choice: sum(math.log(result.profile[unit][choice].e_o + 1e-12) for unit in units))
    errors = [[math.log10(result.profile[unit][choice].e_o + 1e-12) for unit in units] for choice in pairs]
    figure, axes = pyplot.subplots(figsize=(max(6, 0.27 * len(units) + 2), 3.6), layout="constrained")
    image = axes.imshow(errors, aspect="auto", cmap="magma")
    axes.set_yticks(range(len(pairs)), [choice.pair for choice in pairs])
    every = max(len(units) // 30, 1)
    names = [str(layer) if head is None else f"{layer}.{head}" for layer, head in units]
    axes.set_xticks(range(0, len(units), every), names[::every], fontsize=7, rotation=90 if len(units) > 40 else 0)
    axes.set_xlabel("layer" if units[0][1] is None else "layer.head")
    figure.colorbar(image, label="log10 of the error of the attention output")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
