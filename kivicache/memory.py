"""[`MemoryReport`]: what a cache weighs, in bytes that are really held."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers.cache_utils import StaticLayer


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a cache, of one of its layers, or of one layer's keys or values. Reports add up with ``+``.

    Attributes:
        codes: packed codes.
        scales: scales and minima of the packed codes.
        sinks: the first tokens, in full precision.
        residual: the newest tokens, in full precision.
        full_precision: what is not quantized at all: 16-bit layers and heads (of a growing cache, between their sinks
            and residual), sliding windows, recurrent states.
        slack: allocated room for more tokens.
        values: how many numbers are cached, of keys and values together.
        packed_values: how many of them are packed.
        layers: for a whole cache, one report per layer.
    """

    codes: int = 0
    scales: int = 0
    sinks: int = 0
    residual: int = 0
    full_precision: int = 0
    slack: int = 0
    values: int = 0
    packed_values: int = 0
    layers: tuple[MemoryReport, ...] = ()

    @property
    def total(self) -> int:
        """All bytes allocated."""
        return self.codes + self.scales + self.sinks + self.residual + self.full_precision + self.slack

    @property
    def sixteen_bit(self) -> int:
        """Bytes that the same values take in 16 bits each."""
        return 2 * self.values

    @property
    def bits_per_value(self) -> float:
        """True bits per cached value, everything counted (0.0 for an empty cache)."""
        return 8 * self.total / self.values if self.values else 0.0

    @property
    def packed_bits_per_value(self) -> float:
        """Bits of codes, scales and minima per packed value (0.0 while nothing is packed)."""
        return 8 * (self.codes + self.scales) / self.packed_values if self.packed_values else 0.0

    def __add__(self, other: MemoryReport) -> MemoryReport:
        counts = (f.name for f in fields(self) if f.name != "layers")
        return MemoryReport(**{name: getattr(self, name) + getattr(other, name) for name in counts})

    def rows(self) -> list[tuple[str, str]]:
        """The report as (label, text) rows, for a table."""
        parts = ("codes", "scales", "sinks", "residual", "full_precision", "slack", "total")
        labels = {"scales": "scales and minima", "full_precision": "not quantized"}
        rows = [(labels.get(part, part), format_bytes(getattr(self, part))) for part in parts]
        rows.append(("in 16 bits", format_bytes(self.sixteen_bit)))
        ratio = f" ({size_against(self.total, self.sixteen_bit)} than 16 bits)" if self.total else ""
        rows.append(("bits per value", f"{self.bits_per_value:.2f}{ratio}"))
        rows.append(("bits per packed value", f"{self.packed_bits_per_value:.2f}"))
        return rows

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        return "\n".join(f"{label:<{width}}  {text}" for label, text in self.rows())


def size_against(nbytes: int, others: int) -> str:
    """How ``nbytes`` compares with ``others``: "2.22x smaller"."""
    return f"{others / nbytes:.2f}x smaller" if nbytes <= others else f"{nbytes / others:.2f}x larger"


def held_by(layer: Any) -> MemoryReport:
    """The bytes of a transformers cache layer: its keys and values, and any states that it keeps in dicts."""
    tensors = []
    for name, held in vars(layer).items():
        if not name.startswith("_"):
            tensors += [t for t in (held.values() if isinstance(held, dict) else [held]) if isinstance(t, Tensor)]
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]  # the others count tokens
    unused: list[Tensor] = []
    if isinstance(layer, StaticLayer) and layer.keys is not None and layer.values is not None:
        room = max(layer.keys.shape[2] - int(layer.get_seq_length()), 0)
        unused = [states[:, :, :room] for states in (layer.keys, layer.values)]
    slack = sum(states.nbytes for states in unused)
    return MemoryReport(
        full_precision=sum(t.untyped_storage().nbytes() for t in tensors) - slack,
        slack=slack,
        values=sum(t.numel() for t in tensors) - sum(states.numel() for states in unused),
    )


def format_bytes(count: float) -> str:
    """``count`` bytes in the largest unit of 1024 that leaves at least one: "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
