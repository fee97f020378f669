"""What an evaluation found, as a terminal table, as CSV, and as plots."""

from __future__ import annotations

import csv
import platform
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from kivicache import __version__
from kivicache.caches import NOTHING_PACKED, CacheSpec
from kivicache.evaluation import Result
from kivicache.files import replacing
from kivicache.models import MissingPackage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

# metric -> (heading, how it is written)
COLUMNS = {
    "bits_per_value": ("bits", "{:.2f}"),
    "bits_per_packed_value": ("packed", "{:.2f}"),
    "perplexity": ("ppl", "{:.2f}"),
    "kl_mean": ("KL", "{:.4f}"),
    "kl_median": ("median", "{:.4f}"),
    "kl_p99": ("p99", "{:.3f}"),
    "top1_agreement": ("same top", "{:.1%}"),
    "alike_before": ("alike before", "{:.1f}"),
    "equal_tokens": ("equal tokens", "{:.1%}"),
}
NOTE = (
    "bits: per cached value, exact tokens, scales and minima included; packed: per quantized value. KL to full "
    "precision in nats per token: its mean, median and 99th percentile."
)
NONE_PACKED = "the texts are no longer than what stays exact, or no layer is to be packed."
# what the plot of quality against bits shows: metric -> (axis label, logarithmic)
QUALITY = {
    "kl_mean": ("KL to full precision, nats per token", True),
    "equal_tokens": ("tokens equal to full precision's", False),
}
BITS = {
    "bits_per_packed_value": "packed: what has left the window, as long contexts come to",
    "bits_per_value": "whole cache at the length measured, exact tokens in 16 bits",
}
# where a name may stand beside its point, in points and with its alignments: close, or further off with a thin line
PLACES = [((6, 0), "left", "center"), ((-6, 0), "right", "center"), ((0, 5), "center", "bottom")] + [
    ((x * distance, y * distance), align, "center")
    for distance in (12, 20, 30, 42)
    for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0.4), (1, -0.4), (-1, 0.4), (-1, -0.4))
    for align in ("left" if x > 0 else "right",)
]
COLORS = {"kivi": "#0b6e4f", "quanto": "#c1666b", "hqq": "#d4a03a", "fp8": "#6c757d", "dynamic": "#222222"}
KINDS = {
    "kivi": "KIVICache",
    "quanto": "QuantizedCache, quanto",
    "hqq": "QuantizedCache, hqq",
    "fp8": "QuantizedCache, fp8",
    "dynamic": "DynamicCache",
}


def by_task(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results that there are, task by task."""
    tasks: dict[str, list[Result]] = {}
    for result in results:
        if result.records:
            tasks.setdefault(result.task.label, []).append(result)
    return tasks


def render(results: Sequence[Result], console: Console) -> None:
    """Print a table per task, a row per cache."""
    from rich import box
    from rich.table import Table

    for own in by_task(results).values():
        names = list(own[0].metrics)
        console.print(_named(own[0]), style="bold", soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("cache", overflow="fold")
        for name in names:
            table.add_column(_heading(name), justify="right", no_wrap=True)
        for result in own:
            table.add_row(result.cache.name, *(_written(name, result.metrics[name]) for name in names))
        console.print(table)
        exact = [result.cache.name for result in own if _is_to_pack(result.cache) and _is_exact(result)]
        if exact:
            console.print(f"No value takes less than 16 bits in {', '.join(exact)}: {NONE_PACKED}\n", style="yellow")
    console.print(NOTE, style="dim")


def report(results: Sequence[Result], folder: str | Path, model: str) -> list[Path]:
    """Write ``TASK.csv`` and ``TASK.png`` into ``folder``, and return the files.

    Args:
        model: its name, for the first line of the tables.
    """
    if find_spec("matplotlib") is None:
        raise MissingPackage("matplotlib", 'pip install "kivicache[eval]"')
    folder, files = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for label, own in by_task(results).items():
        files.append(write_csv(own, folder / f"{label}.csv", model))
        if own[0].records[0].place:
            files.append(plot_grid(own, folder / f"{label}.png"))
        else:
            files.append(plot_quality(own, folder / f"{label}.png"))
    return files


def write_csv(results: Sequence[Result], path: Path, model: str) -> Path:
    """One task's table; the first line says what it was measured with."""
    rows = [
        {"cache": result.cache.name}
        | {name: f"{value:.6g}" for name, value in result.metrics.items()}
        | {"items": len(result.records), "seconds": f"{sum(record.seconds for record in result.records):.0f}"}
        for result in results
    ]
    with replacing(path) as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
        file.write(
            f"# {model}, {_named(results[0])}; {platform.system()} {platform.machine()}, "
            f"kivicache {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"Python {platform.python_version()}\n"
        )
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def plot_quality(results: Sequence[Result], path: Path) -> Path:
    """Quality against true bits, a point for each setting: of what is packed, and of the whole cache."""
    metric = next((name for name in results[0].metrics if name in QUALITY), list(results[0].metrics)[-1])
    label, logarithmic = QUALITY.get(metric, (_heading(metric), False))
    positive = [result for result in results if result.metrics[metric] > 1e-9]
    logarithmic = logarithmic and bool(positive)  # where all are exact, there is nothing to take a logarithm of
    shown = positive if logarithmic else results
    figure, panels = pyplot().subplots(1, 2, figsize=(15, 8), sharey=True, layout="constrained")
    for axes, (bits, title) in zip(panels, BITS.items(), strict=True):
        for kind in dict.fromkeys(result.cache.kind for result in shown):
            own = [result.metrics for result in shown if result.cache.kind == kind]
            x, y = [metrics[bits] for metrics in own], [metrics[metric] for metrics in own]
            axes.scatter(x, y, color=COLORS.get(kind), label=KINDS.get(kind, kind), s=22, zorder=3)
        if logarithmic:
            axes.set_yscale("log")
        axes.margins(x=0.12, y=0.06)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("true bits per value, scales and minima included")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"{_named(results[0])}", fontsize=9, color="#555555")
    figure.canvas.draw()
    for axes, bits in zip(panels, BITS, strict=True):
        _name_points(axes, [(r.metrics[bits], r.metrics[metric], r.cache) for r in shown])
    return save(figure, path, dpi=130)


def plot_grid(results: Sequence[Result], path: Path) -> Path:
    """A heat map per cache of the first metric of each place: depth over length."""
    columns = min(len(results), 4)
    rows = -(-len(results) // columns)
    size = (2.6 * columns + 1, 2.4 * rows + 0.4)
    figure, grid = pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(results) :]:
        axes.set_visible(False)
    for axes, result in zip(grid.flat, results, strict=False):
        image = _heat_map(axes, result)
    figure.supxlabel("tokens")
    figure.supylabel("depth")
    figure.colorbar(image, ax=grid, label="found", shrink=0.7)
    return save(figure, path)


def _heat_map(axes: Axes, result: Result) -> Any:
    lengths = sorted({record.place["length"] for record in result.records})
    depths = sorted({record.place["depth"] for record in result.records})
    cells = torch.full((len(depths), len(lengths)), torch.nan)
    for i, depth in enumerate(depths):
        for j, length in enumerate(lengths):
            own = [r for r in result.records if (r.place["length"], r.place["depth"]) == (length, depth)]
            if own:
                cells[i, j] = sum(float(next(iter(record.scores.values()))) for record in own) / len(own)
                axes.text(j, i, f"{cells[i, j].item():.0%}", ha="center", va="center", fontsize=8)
    image = axes.imshow(cells.tolist(), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), lengths, fontsize=8)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
    packed, whole = (result.metrics[name] for name in BITS)
    axes.set_title(f"{result.cache.name}\n{packed:.1f} bits packed, {whole:.1f} whole cache", fontsize=8)
    return image


def _name_points(axes: Axes, points: list[tuple[float, float, CacheSpec]]) -> None:
    """Write each name beside its point, where it covers no other; where there is no room, leave it out."""
    line = {"arrowstyle": "-", "lw": 0.4, "color": "#999999", "shrinkA": 0, "shrinkB": 2}
    dots = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken: list[Any] = []
    for x, y, cache in sorted(points, key=lambda point: (point[1], point[0])):
        for offset, align, vertical in PLACES:
            text = axes.annotate(
                cache.name,
                (x, y),
                offset,
                textcoords="offset points",
                ha=align,
                va=vertical,
                fontsize=6.5,
                color=COLORS.get(cache.kind),
            )
            box = text.get_window_extent()
            if _is_free(box, axes, taken, dots):
                taken.append(box)
                axes.annotate("", (x, y), offset, textcoords="offset points", arrowprops=line)
                break
            text.remove()


def _is_free(box: Any, axes: Axes, taken: list[Any], dots: list[Any]) -> bool:
    inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
    wide = box.padded(4)  # a dot's radius
    return inside and not any(map(box.padded(1).overlaps, taken)) and not any(wide.contains(*dot) for dot in dots)


def _is_to_pack(cache: CacheSpec) -> bool:
    settings = cache.settings
    all_exact = {settings.get("nbits_key"), settings.get("nbits_value")} == {16}
    return cache.kind != "dynamic" and (not all_exact or bool(settings.get("layers") or settings.get("heads")))


def _is_exact(result: Result) -> bool:
    return result.metrics["bits_per_packed_value"] == NOTHING_PACKED


def _named(result: Result) -> str:
    """The task with its fields, as `parse_task` reads it, a file in them without its folder."""
    given = {name: value for name, value in vars(result.task).items() if value is not None}
    if "data" in given and Path(given["data"]).is_file():
        given["data"] = Path(given["data"]).name
    fields = (
        f"{name}=[{','.join(map(str, value))}]" if isinstance(value, tuple) else f"{name}={value}"
        for name, value in given.items()
    )
    return f"{result.task.name}:{','.join(fields)}"


def _heading(name: str) -> str:
    return COLUMNS[name][0] if name in COLUMNS else name.replace("_", " ")


def _written(name: str, value: float) -> str:
    return (COLUMNS[name][1] if name in COLUMNS else "{:.1%}").format(value)


def save(figure: Any, path: Path, dpi: int = 150) -> Path:
    """Write the picture, and let go of it."""
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=dpi)
    pyplot().close(figure)
    return path


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
