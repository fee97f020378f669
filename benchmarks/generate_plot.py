"""Pictures of the tables that benchmarks/generate.py makes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

COLORS = {"kivi-2": "#0b6e4f", "kivi-4": "#2f9e77", "kivi-k4v2": "#7cc7a6", "static": "#1f3d7a", "dynamic": "#333333"}
OTHERS = {"quanto-4": "#c0392b", "quanto-2": "#e67e73", "hqq-4": "#b9770e", "hqq-2": "#e0b15c", "fp8": "#8e44ad"}


def read(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The machine, and the rows that have numbers."""
    with path.open(encoding="utf-8") as file:
        machine = next(file).removeprefix("# ").split(";")[0].strip()
        return machine, [row for row in csv.DictReader(file) if row["status"] == "ok"]


def style(cache: str) -> dict[str, Any]:
    """Color by kind; solid where the step is compiled."""
    compiled = cache.endswith("-fixed") or cache == "static"
    color = (COLORS | OTHERS)[cache.removesuffix("-fixed")]
    return {"color": color, "linestyle": "-" if compiled else "--", "marker": "o", "markersize": 4}


def figure(rows: int, columns: int) -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        rows, columns, figsize=(4.6 * columns + 1.8, 3.6 * rows + 0.4), layout="constrained", squeeze=False
    )


def plot_grid(folder: Path) -> None:
    """Time of a decode step by prompt length: a panel for each model and batch, a line for each cache."""
    machine, rows = read(folder / "generate.csv")
    models = list(dict.fromkeys(row["model"] for row in rows))
    batches = sorted({int(row["batch"]) for row in rows})
    drawn, panels = figure(len(models), len(batches))
    for axes, model in zip(panels, models, strict=True):
        for panel, batch in zip(axes, batches, strict=True):
            here = [row for row in rows if (row["model"], row["batch"]) == (model, str(batch))]
            for cache in dict.fromkeys(row["cache"] for row in here):
                points = sorted((int(row["prompt"]), float(row["step_ms"])) for row in here if row["cache"] == cache)
                panel.plot(*zip(*points, strict=True), label=cache, **style(cache))
            panel.set_title(f"{model}, batch {batch}", fontsize=10)
            prompts = sorted({int(row["prompt"]) for row in here})
            panel.set_xscale("log", base=2)
            panel.set_xticks(prompts, [f"{prompt / 1024:g}k" for prompt in prompts])
            panel.set_yscale("log")
            for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
                axis("{x:g}")
            panel.set_xlabel("prompt, tokens")
            panel.set_ylabel("ms per decode step")
            panel.spines[["top", "right"]].set_visible(False)
    handles = {}
    for panel in panels.flat:
        handles |= {label: line for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    drawn.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9)
    drawn.suptitle(f"Decode step of generate, solid: compiled ({machine})", fontsize=9)
    drawn.savefig(folder / "generate.png", dpi=150)


def plot_fit(folder: Path) -> None:
    """The largest batch, or context, that fits: a panel for each question, a bar for each cache."""
    path = folder / "generate_fit.csv"
    if not path.exists():
        return
    machine, rows = read(path)
    questions = list(dict.fromkeys((row["model"], row["memory_gib"], row["fit"], row["of"]) for row in rows))
    drawn, panels = figure(len(questions), 1)
    for (panel,), question in zip(panels, questions, strict=True):
        model, memory, fit, of = question
        here = [row for row in rows if (row["model"], row["memory_gib"], row["fit"], row["of"]) == question]
        here.sort(key=lambda row: int(row["largest"]))
        bars = panel.barh(
            [row["cache"] for row in here],
            [int(row["largest"]) for row in here],
            color=[style(row["cache"])["color"] for row in here],
        )
        panel.bar_label(bars, [f"{int(row['largest']):,}" for row in here], padding=4, fontsize=9)
        panel.margins(x=0.15)
        given = f"{int(of):,} tokens each" if fit == "batch" else f"batch {of}"
        panel.set_title(f"largest {fit}, {given}: {model}, {memory} GiB", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    drawn.suptitle(machine, fontsize=9)
    drawn.savefig(folder / "generate_fit.png", dpi=150)
