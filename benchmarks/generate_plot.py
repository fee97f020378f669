"""Pictures of the tables that benchmarks/generate.py makes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]

COLORS = {
    "kivi-2": "#0b6e4f",
    "kivi-3bit": "#14532d",
    "kivi-2-r32": "#3d8b6f",
    "kivi-2-paper-r32": "#a3b18a",
    "kivi-4": "#2f9e77",
    "kivi-k4v2": "#7cc7a6",
    "static": "#1f3d7a",
    "dynamic": "#333333",
    "quanto-4": "#c0392b",
    "quanto-2": "#e67e73",
    "hqq-4": "#b9770e",
    "hqq-2": "#e0b15c",
    "fp8": "#8e44ad",
}


def read(path: Path) -> tuple[str, list[Row]]:
    """The machine, and the rows that have numbers."""
    with path.open(encoding="utf-8") as file:
        machine = next(file).removeprefix("# ").split(";")[0].strip()
        return machine, [row for row in csv.DictReader(file) if row["status"] == "ok"]


def color(cache: str) -> str:
    return COLORS[cache.removesuffix("-fixed")]


def groups(rows: Sequence[Row], keys: Sequence[str], of: str) -> list[list[Row]]:
    """The rows that are alike in ``keys``, where there are several values of ``of``."""
    alike: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        alike.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [group for group in alike.values() if len({row[of] for row in group}) > 1]


def length(tokens: str) -> str:
    return f"{int(tokens) / 1024:g}k" if int(tokens) % 1024 == 0 else tokens


def draw(panels: Sequence[Callable[[Any], None]], title: str, path: Path) -> None:
    """One picture of ``panels``, each of which draws on its axes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.6 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    for panel, paint in zip(axes[0], panels, strict=True):
        paint(panel)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def steps(panel: Any, rows: Sequence[Row]) -> None:
    """Time of a decode step by prompt, a line for each cache: solid where `generate` compiles the step."""
    for cache in dict.fromkeys(row["cache"] for row in rows):
        points = sorted((int(row["prompt"]), float(row["step_ms"])) for row in rows if row["cache"] == cache)
        line = "-" if cache.endswith("-fixed") or cache == "static" else "--"
        panel.plot(*zip(*points, strict=True), line, color=color(cache), marker="o", markersize=4, label=cache)
    prompts = sorted({row["prompt"] for row in rows}, key=int)
    panel.set_xscale("log", base=2)
    panel.set_xticks([int(prompt) for prompt in prompts], [length(prompt) for prompt in prompts])
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "235" else "")
    panel.set_xlabel("tokens in the cache")
    panel.set_ylabel("ms per decode step")
    panel.set_title(f"{rows[0]['model']}, batch {rows[0]['batch']}; solid: compiled", fontsize=10)
    panel.legend(frameon=False, fontsize=8, ncols=2)


def bars(panel: Any, rows: Sequence[Row], of: str, label: Callable[[Row], str], title: str) -> None:
    """A bar of ``of`` for each cache: its largest."""
    largest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: float(row[of])):
        largest.pop(row["cache"], None)
        largest[row["cache"]] = row
    drawn = panel.barh(list(largest), [float(row[of]) for row in largest.values()], color=[*map(color, largest)])
    panel.bar_label(drawn, [label(row) for row in largest.values()], padding=4, fontsize=9)
    panel.margins(x=0.4)
    panel.set_title(title, fontsize=10)


def throughput(panel: Any, rows: Sequence[Row]) -> None:
    def label(row: Row) -> str:
        return f"{float(row['decode_tokens_per_s']):,.0f}, batch {row['batch']}"

    title = f"{rows[0]['model']}, prompts of {length(rows[0]['prompt'])}: tokens per second"
    bars(panel, rows, "decode_tokens_per_s", label, title)


def plot(folder: Path) -> None:
    """Decode steps by prompt, and tokens per second by cache: of what the table has at several prompts or batches."""
    machine, rows = read(folder / "generate.csv")
    panels: list[Callable[[Any], None]] = []
    for group in groups(rows, ("model", "memory_gib", "batch", "filled", "new"), "prompt"):
        panels.append(lambda panel, group=group: steps(panel, group))
    batches = [row for row in rows if row["batch"] != "1"]
    for group in groups(batches, ("model", "memory_gib", "prompt", "filled", "new"), "batch"):
        panels.append(lambda panel, group=group: throughput(panel, group))
    draw(panels, f"generate on {machine}", folder / "generate.png")


def plot_fit(folder: Path) -> None:
    """The largest batch, or context, that fits: a panel for each question, a bar for each cache."""
    path = folder / "generate_fit.csv"
    if not path.exists():
        return
    machine, rows = read(path)
    alike: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        alike.setdefault((row["model"], row["memory_gib"], row["fit"], row["of"]), []).append(row)

    def panel_of(group: list[Row]) -> Callable[[Any], None]:
        row = group[0]
        given = f"{length(row['of'])} tokens each" if row["fit"] == "batch" else f"batch {row['of']}"
        memory = "" if row["memory_gib"] == "all" else f", {row['memory_gib']} GiB"
        title = f"{row['model']}, {given}{memory}: largest {row['fit']}"
        return lambda panel: bars(panel, group, "largest", lambda row: f"{int(row['largest']):,}", title)

    draw([panel_of(group) for group in alike.values()], machine, folder / "generate_fit.png")
