"""Ideas measured before they are built: 3-bit codes, 8-bit scales and minima, boosted key channels, more sinks.

    python -m benchmarks.experiments --text wiki.test.raw

Simulated densely: what is due is replaced by what quantization would give back, and the bits are counted by formula.
Text and steps are those of `benchmarks.accuracy`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from benchmarks.accuracy import RESULTS, TASKS
from kivicache import KIVIConfig, MemoryReport
from kivicache.caches import CacheSpec
from kivicache.evaluation import evaluate
from kivicache.evaluation_report import write_csv
from kivicache.models import load_model
from kivicache.policy import packed_lengths
from kivicache.quantization import dequantize, encode, quantize
from kivicache.rotation import hadamard

BLOCK = 32  # tokens that leave the window together, and whose scales share a second level


@dataclass(frozen=True)
class Scheme:
    """A way to quantize. ``boosted``: the share of key channels, the largest of each group, that get 4 bits."""

    nbits_key: int = 2
    nbits_value: int = 2
    group_size: int = 32
    scale_bits: int = 16
    boosted: float = 0.0
    rotated: bool = False
    sinks: int = 32

    def spec(self) -> Simulated:
        name = f"K{self.nbits_key}V{self.nbits_value} g{self.group_size}"
        name += " 8-bit scales" if self.scale_bits == 8 else ""
        name += f" {self.boosted:.1%} of key channels 4 bits" if self.boosted else ""
        name += " hadamard" if self.rotated else ""
        name += f" {self.sinks} sinks" if self.sinks != 32 else ""
        return Simulated(name, "simulated", asdict(self))

    def restored(self, states: Tensor, side: str) -> Tensor:
        """Keys or values ``[batch, heads, tokens, head_dim]`` as they come back."""
        turned = hadamard(states.float()) if self.rotated else states.float()
        nbits, axis = (self.nbits_key, "channel") if side == "key" else (self.nbits_value, "token")
        back = self._restored(turned, nbits, axis)
        if side == "key" and self.boosted:
            groups = turned.abs().unflatten(2, (-1, self.group_size)).mean(3)
            chosen = groups.topk(round(self.boosted * states.shape[3]), dim=-1).indices
            mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, chosen, True)
            back = torch.where(mask.repeat_interleave(self.group_size, 2), self._restored(turned, 4, axis), back)
        return (hadamard(back) if self.rotated else back).to(states.dtype)

    def _restored(self, states: Tensor, nbits: int, axis: str) -> Tensor:
        codes, scale, minimum = quantize(states, nbits, self.group_size, axis)
        if self.scale_bits == 8:
            rows = BLOCK // self.group_size if axis == "channel" else BLOCK
            scale, minimum = _in_8_bits(scale, rows), _in_8_bits(minimum, rows)
            codes = encode(states, scale, minimum, nbits, self.group_size, axis)
        return dequantize(codes, scale, minimum, self.group_size, axis)

    def bits(self, head_dim: int) -> float:
        """Bits per quantized value, of keys and values on average."""
        second_level = 64 / (head_dim * BLOCK / self.group_size) if self.scale_bits == 8 else 0
        metadata = (2 * self.scale_bits + second_level) / self.group_size
        boost = self.boosted * (4 - self.nbits_key) + (1 / self.group_size if self.boosted else 0)
        return (self.nbits_key + boost + self.nbits_value) / 2 + metadata


def _in_8_bits(numbers: Tensor, rows: int) -> Tensor:
    """Scales or minima in 8 bits; ``rows`` rows of a head, a block of tokens, share the scale and minimum of these."""
    blocks = numbers.float().unflatten(2, (-1, rows)).flatten(3)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / 255).clamp_min(1e-12)
    return (((blocks - low) / step).round() * step + low).reshape(numbers.shape)


class SimulatedLayer(DynamicLayer):
    """Holds everything densely; tokens that leave the window are replaced by what quantization gives back."""

    def __init__(self, scheme: Scheme):
        super().__init__()
        self.scheme = scheme
        self.policy = KIVIConfig(nbits=2, group_size=BLOCK, sink_length=scheme.sinks).layer(0)
        self.quantized = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        due, start = packed_lengths(self.policy, keys.shape[2])[0], self.scheme.sinks + self.quantized
        end = self.scheme.sinks + due
        if end > start:
            self.keys, self.values = (
                torch.cat([s[:, :, :start], self.scheme.restored(s[:, :, start:end], side), s[:, :, end:]], dim=2)
                for s, side in ((keys, "key"), (values, "value"))
            )
            self.quantized = due
        return keys, values

    def memory(self) -> MemoryReport:
        batch, heads, tokens, head_dim = self.keys.shape
        packed = 2 * batch * heads * head_dim * self.quantized
        codes = round(self.scheme.bits(head_dim) * packed / 8)
        return MemoryReport(codes=codes, values=2 * batch * heads * head_dim * tokens, packed_values=packed)


class Simulated(CacheSpec):
    def new(self, config: PreTrainedConfig) -> Cache:
        cache = DynamicCache(config=config)
        cache.layers = [SimulatedLayer(Scheme(**self.settings)) for _ in cache.layers]
        return cache


SCHEMES = [
    Scheme(),
    Scheme(scale_bits=8),
    Scheme(group_size=16),
    Scheme(group_size=16, scale_bits=8),
    Scheme(boosted=0.125),
    Scheme(boosted=0.25),
    Scheme(boosted=0.125, scale_bits=8),
    Scheme(boosted=0.25, scale_bits=8),
    Scheme(boosted=0.25, group_size=16, scale_bits=8),
    Scheme(nbits_key=3),
    Scheme(nbits_key=3, scale_bits=8),
    Scheme(nbits_key=3, nbits_value=3),
    Scheme(nbits_key=4),
    Scheme(nbits_key=4, scale_bits=8),
    Scheme(nbits_key=4, nbits_value=3, scale_bits=8),
    Scheme(rotated=True),
    Scheme(rotated=True, scale_bits=8),
    Scheme(rotated=True, group_size=16, scale_bits=8),
    Scheme(rotated=True, boosted=0.25),
    Scheme(rotated=True, nbits_key=3, scale_bits=8),
    Scheme(rotated=True, nbits_key=3, nbits_value=3, scale_bits=8),
    Scheme(rotated=True, nbits_key=4, scale_bits=8),
    *(Scheme(sinks=sinks) for sinks in (0, 4, 64)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="a text file, such as WikiText-2's test split")
    parser.add_argument("--limit", type=int, default=2, help="sequences")
    parser.add_argument("--store", type=Path, default=Path("experiments-records.jsonl"))
    args = parser.parse_args()
    model, tokenizer = load_model()
    results = evaluate(
        model,
        tokenizer,
        [scheme.spec() for scheme in SCHEMES],
        [TASKS["fidelity"].format(text=args.text)],
        store=args.store,
        limit=args.limit,
        on_progress=lambda done, total, what: print(f"{done}/{total} {what}", flush=True),
    )
    write_csv(results, RESULTS / "experiments.csv", str(model.name_or_path))


if __name__ == "__main__":
    main()
