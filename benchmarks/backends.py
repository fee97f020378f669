"""What each backend's choice of scale and minimum costs and gains: KL through the cache, error, and time.

    pip install -e ".[demo,hqq,quanto]"
    python -m benchmarks.backends --text wiki.test.raw

KL is measured as by `kivicache eval`. The error is the mean squared one of the packed tokens, relative to their
variance, averaged over the layers; the time is the processor's for packing the prompts of all layers, best of three.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import time
from pathlib import Path

import torch
import transformers

from kivicache import KIVIConfig, __version__
from kivicache.fidelity import text_pieces
from kivicache.files import replacing
from kivicache.layer import KIVILayer
from kivicache.models import load_model
from kivicache.objectives import CachedKL, read_states

RESULTS = Path(__file__).parent / "results"
BACKENDS = ("native", "mse", "hqq", "quanto")


def measured(loss: CachedKL, config: KIVIConfig) -> dict[str, str]:
    """One row: the setting, then KL in nats per token, errors of keys and values, and packing time in seconds."""
    seconds = min(packing_seconds(loss, config) for _ in range(3))
    layers = {idx: loss.layer(idx, config.layer(idx)) for idx in loss.layers}
    errors = []
    for idx, layer in layers.items():
        for read, exact in zip(read_states(layer), loss.prompt_states(idx), strict=True):
            packed = slice(config.sink_length, exact.shape[2] - len(layer._keys.residual))
            error = (read - exact)[:, :, packed].square().mean() / exact[:, :, packed].var()
            errors.append(error.item())
    return {
        "backend": config.backend,
        "bits": str(config.nbits_key),
        "rotation": config.rotation or "",
        "bits_per_value": f"{loss.cache(config).memory().packed_bits_per_value:.2f}",
        "kl": f"{loss(config):.5f}",
        "key_error": f"{sum(errors[::2]) / len(layers):.2e}",
        "value_error": f"{sum(errors[1::2]) / len(layers):.2e}",
        "pack_s": f"{seconds:.2f}",
    }


def packing_seconds(loss: CachedKL, config: KIVIConfig) -> float:
    states = [(KIVILayer(config.layer(idx)), loss.prompt_states(idx)) for idx in loss.layers]
    start = time.process_time()
    for layer, (keys, values) in states:
        layer.update(keys, values)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="a text file, such as WikiText-2's test split")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--prefill", type=int, default=768, help="tokens of each sequence that are prefilled")
    parser.add_argument("--steps", type=int, default=256, help="tokens that are fed behind them and scored")
    parser.add_argument("--step", type=int, default=32, help="tokens per step")
    parser.add_argument("--out", type=Path, default=RESULTS / "backends.csv")
    args = parser.parse_args()
    model, tokenizer = load_model(None)
    text = Path(args.text).read_text(encoding="utf-8")
    batch = text_pieces(tokenizer, text, args.sequences, args.prefill + args.steps + 1)
    loss = CachedKL(model, batch, args.prefill, args.step)
    with replacing(args.out) as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
        file.write(
            f"# SmolLM2-135M-Instruct, {Path(args.text).name}, {args.sequences} sequences, prefill {args.prefill}, "
            f"then {args.steps} tokens in steps of {args.step}; cpu ({torch.get_num_threads()} threads), "
            f"{platform.machine()}, kivicache {__version__}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}, Python {sys.version.split()[0]}; pack_s: "
            f"packing {args.sequences} prompts in {len(loss.layers)} layers\n"
        )
        writer: csv.DictWriter[str] | None = None
        for rotation in (None, "hadamard"):
            for nbits in (2, 4, 8):
                for backend in BACKENDS:
                    row = measured(loss, KIVIConfig(nbits=nbits, backend=backend, rotation=rotation))
                    if writer is None:
                        writer = csv.DictWriter(file, row)
                        writer.writeheader()
                    writer.writerow(row)
                    file.flush()
                    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
