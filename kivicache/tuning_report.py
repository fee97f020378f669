"""What a search found, as a table and as pictures."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from kivicache.evaluation_report import pyplot, save
from kivicache.sensitivity import Choice, Unit
from kivicache.tuning import Point, TuningResult, front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console


def render_tuning(result: TuningResult, console: Console) -> None:
    """Print the tuned setting among the uniform ones of up to a bit more, and how often each choice was taken."""
    from rich import box
    from rich.table import Table

    table = Table(
        "setting", "true bits", "calibration loss", "tuned is better by", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    best = result.best
    near = [point for point in result.measured.uniform if point.bits <= best.bits + 1]
    for point in sorted([*near, best], key=lambda point: (point.bits, -point.loss)):
        ratio = "" if point is best or best.loss <= 0 else f"{point.loss / best.loss:.2f}x"
        style = "bold green" if point is best else None
        table.add_row(point.label or "tuned", f"{point.bits:.3f}", f"{point.loss:.5f}", ratio, style=style)
    console.print(table)
    console.print(f"different settings tried: {len(result.trials)}")
    taken = Counter(str(choice) for choice in tuned_choices(result).values())
    console.print("taken: " + ", ".join(f"{count} x {choice}" for choice, count in taken.most_common()))


def tuned_choices(result: TuningResult) -> dict[Unit, Choice]:
    """What every layer or head was given."""
    chosen: dict[Unit, Choice] = {}
    for layer_idx, head in result.measured.profile:
        layer = result.config.layer(layer_idx)
        if head is None:
            chosen[layer_idx, head] = Choice(layer.nbits_key, layer.nbits_value, layer.group_size, layer.rotation)
        else:
            chosen[layer_idx, head] = Choice(*layer.heads.get(head, (layer.nbits_key, layer.nbits_value)))
    return chosen


def plot_front(result: TuningResult, path: Path) -> Path:
    """Loss against true bits: the trials, their Pareto front, and the uniform settings with and without rotation."""
    figure, axes = pyplot().subplots(figsize=(8, 4.8), layout="constrained")
    tried = [point for point in result.trials if point.loss > 0]
    line, best = front(tried), result.best
    axes.scatter([p.bits for p in tried], [p.loss for p in tried], s=9, color="#b8cfc7", label="trials")
    axes.plot([p.bits for p in line], [p.loss for p in line], ".-", color="#0b6e4f", label="their Pareto front")
    axes.scatter([best.bits], [best.loss], marker="*", s=150, color="#0b6e4f", zorder=3, label="tuned")
    plot_uniform(axes, [p for p in result.measured.uniform if p.loss > 0 and p.bits <= result.settings.budget + 2])
    axes.axvline(result.settings.budget, color="#888888", linewidth=0.8, linestyle="--", label="budget")
    finish_front(axes, "calibration loss (less is better)")
    return save(figure, path)


def plot_uniform(axes: Axes, points: list[Point]) -> None:
    """Uniform settings as crosses, those on their front with their names, apart for plain and rotated."""
    for rotated, color in ((False, "#b3541e"), (True, "#7a4fa3")):
        own = [point for point in points if ("hadamard" in point.label) == rotated]
        label = "uniform, hadamard" if rotated else "uniform"
        axes.scatter([p.bits for p in own], [p.loss for p in own], marker="x", color=color, label=label)
    for point in front(points):
        text = point.label.replace(" hadamard", "")
        axes.annotate(text, (point.bits, point.loss), (5, 4), textcoords="offset points", fontsize=7)


def finish_front(axes: Axes, label: str) -> None:
    axes.set_yscale("log")
    axes.set_xlabel("true bits per packed value, scales and minima included")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def plot_sensitivity(result: TuningResult, path: Path) -> Path:
    """A heat map of the attention output's error e_o by layer (or head) and choice, on a log scale."""
    profile = result.measured.profile
    units = list(profile)
    rows = {choice: [math.log10(profile[unit][choice].e_o + 1e-12) for unit in units] for choice in profile[units[0]]}
    names = sorted(rows, key=lambda choice: -sum(rows[choice]))
    size = (max(6.0, 0.27 * len(units) + 2.5), 1.2 + 0.2 * len(names))
    figure, axes = pyplot().subplots(figsize=size, layout="constrained")
    image = axes.imshow([rows[choice] for choice in names], aspect="auto", cmap="magma")
    axes.set_yticks(range(len(names)), [str(choice) for choice in names], fontsize=7)
    every = max(len(units) // 30, 1)
    labels = [str(layer) if head is None else f"{layer}.{head}" for layer, head in units]
    axes.set_xticks(range(0, len(units), every), labels[::every], fontsize=7, rotation=90 if len(units) > 40 else 0)
    axes.set_xlabel("layer" if units[0][1] is None else "layer.head")
    figure.colorbar(image, label="log10 of the relative error\nof the attention output, e_o")
    return save(figure, path)
