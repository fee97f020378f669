"""How `KIVIConfig.preset` was chosen: on one text, and confirmed on another.

    pip install -e ".[demo,eval]"
    python -m benchmarks.presets --text wiki.test.raw

A preset is the setting with the least KL to full precision, on the built-in text, among those with no more bits per
packed value: bits of keys and values, groups of 32 and 64, with and without rotation. Sinks and residual cost no bits
per packed value; they are the defaults.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.accuracy import RESULTS
from kivicache.evaluation import evaluate
from kivicache.evaluation_report import write_csv
from kivicache.models import load_model

CANDIDATES = [
    f"kivi:{bits}:g{group}{rotation}"
    for bits in ("2", "k2v4", "k4v2", "4")
    for group in (32, 64)
    for rotation in ("", ":hadamard")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="the other text, such as WikiText-2's test split")
    parser.add_argument("--store", type=Path, default=Path("presets-records.jsonl"))
    args = parser.parse_args()
    model, tokenizer = load_model()
    for name, task in (("presets", "fidelity"), ("presets_confirmed", f"fidelity:data={args.text}")):
        results = evaluate(
            model,
            tokenizer,
            CANDIDATES,
            [task],
            store=args.store,
            on_progress=lambda done, total, what: print(f"{done}/{total} {what}", flush=True),
        )
        write_csv(results, RESULTS / f"{name}.csv", str(model.name_or_path))


if __name__ == "__main__":
    main()
