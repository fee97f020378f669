"""Bars of the decode benchmark's tables."""

from __future__ import annotations

import csv
from pathlib import Path


def plot(table: Path) -> None:
    """Draw the speedup of every case of ``table``, and what its bytes would allow, beside it as PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with table.open(encoding="utf-8") as file:
        machine = next(file).removeprefix("# ").split(",")[0].strip()
        rows = [row for row in csv.DictReader(file) if row["status"] == "ok"]
    labels = [f"{r['name']}, batch {r['batch']}, {int(r['tokens']) // 1024}k, {r['kv_heads']} kv heads" for r in rows]
    speedups = [float(row["speedup"]) for row in rows]
    figure, axes = pyplot.subplots(figsize=(8.5, 0.36 * len(rows) + 1.3), layout="constrained")
    axes.barh(labels, [float(row["byte_ceiling"]) for row in rows], color="#e3e3e3", label="ceiling by bytes")
    bars = axes.barh(labels, speedups, color="#0b6e4f", label="measured")
    axes.bar_label(bars, [f"{speedup:.2f}x" for speedup in speedups], padding=4)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as PyTorch's best 16-bit attention, {machine}", loc="right")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    figure.savefig(table.with_suffix(".png"), dpi=150)
    pyplot.close(figure)
