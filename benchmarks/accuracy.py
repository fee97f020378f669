"""The README's accuracy tables and plots: every setting that the library has, and transformers' own caches.

    pip install -e ".[demo,eval,hqq,quanto]"
    python -m benchmarks.accuracy --text wiki.test.raw

It is `kivicache eval` with its settings written down. What is measured is kept, so it can be interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kivicache.evaluation import evaluate
from kivicache.evaluation_report import report
from kivicache.models import load_model

RESULTS = Path(__file__).parent / "results"
OWN = (
    ["dynamic", "kivi:16", "kivi"]
    + [f"kivi:k{keys}v{values}" for keys in (8, 4, 2) for values in (8, 4, 2) if (keys, values) != (4, 2)]
    + [f"kivi:{bits}:{option}" for bits in ("k4v2", "2") for option in ("g64", "g128", "r32", "r64", "s0", "s4")]
    + [f"kivi:{bits}:{backend}" for bits in ("k4v2", "2") for backend in ("hqq", "quanto")]
    + [f"kivi:{bits}:hadamard" for bits in ("4", "k4v2", "2")]
    + [f"kivi:{bits}:r32:s4{rotation}" for bits in ("4", "k4v2", "2") for rotation in ("", ":hadamard")]
    + ["paper:4", "paper:k4v2", "paper:2"]
)
TRANSFORMERS = (
    ["hf-fp8", "hf-quanto:4", "hf-quanto:2", "hf-hqq:8", "hf-hqq:4", "hf-hqq:2"]
    # the best of the four choices of axes that each takes, in the smaller groups
    + [f"hf-{setting}" for n in (4, 2) for setting in (f"quanto:{n}:g32:a-1/0", f"hqq:{n}:g32:a1/1")]
)
TASKS = {
    "fidelity": "fidelity:data={text}",
    "greedy": "greedy:data={text},prompts=4,prefill=512,tokens=64",
    "passkey": "passkey:lengths=[1024,2048],depths=4",
}
FEW = ["dynamic", "kivi:4", "kivi", "kivi:2", "kivi:2:hadamard", "paper:2", "hf-quanto:4", "hf-quanto:2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="a text file, such as WikiText-2's test split")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--store", type=Path, default=Path("accuracy-records.jsonl"))
    args = parser.parse_args()
    model, tokenizer = load_model()
    for name in args.task or TASKS:
        task = TASKS[name].format(text=args.text)
        caches = OWN + TRANSFORMERS if name == "fidelity" else FEW
        results = evaluate(
            model,
            tokenizer,
            caches,
            [task],
            store=args.store,
            on_progress=lambda done, total, what: print(f"{done}/{total} {what}", flush=True),
        )
        report(results, RESULTS, str(model.name_or_path))


if __name__ == "__main__":
    main()
