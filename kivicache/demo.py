"""The demo: one prompt, continued from a full-precision cache and from a KIVICache, compared side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from kivicache.cache import KIVICache
from kivicache.config import KIVIConfig
from kivicache.fidelity import cache_argument, first_difference
from kivicache.layer import KIVILayer
from kivicache.memory import MemoryReport, held_by
from kivicache.models import encode, token_texts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

OnProgress = Callable[[str, int], object]  # (stage, how much of it is done)
STAGES = ("loading model", "full precision", "KIVICache")


@dataclass(frozen=True)
class Run:
    """What one cache gave: ``pieces`` are the text token by token, ``label`` says what the cache was."""

    label: str
    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    prefill_seconds: float
    decode_seconds: float
    memory: MemoryReport

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of decoding alone: the tokens after the first, which comes from the prefill. None: there are none."""
        return (len(self.token_ids) - 1) / self.decode_seconds if len(self.token_ids) > 1 else None


@dataclass(frozen=True)
class Divergence:
    """The first new token that differs: its index from 0, and both pieces of text ("" where a text has ended)."""

    index: int
    full_precision: str
    kivi: str


@dataclass(frozen=True)
class Comparison:
    model: str
    device: str
    dtype: str
    config: KIVIConfig
    prompt_tokens: int
    max_new_tokens: int
    full_precision: Run
    kivi: Run
    divergence: Divergence | None


class _Clock(StoppingCriteria):
    """Notes when each new token is there, and stops nothing."""

    def __init__(self, on_token: Callable[[int], object]):
        self.on_token = on_token
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        input_ids[0, -1].item()  # waits for the device
        self.times.append(time.perf_counter())
        self.on_token(len(self.times) - 1)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    config: KIVIConfig,
    max_new_tokens: int,
    on_progress: OnProgress = lambda stage, done: None,
) -> Comparison:
    """Continue ``prompt`` greedily with both caches, each after a warm-up of its own, with the same settings."""
    inputs = encode(tokenizer, prompt).to(model.device)
    makers = (lambda: DynamicCache(config=model.config), lambda: KIVICache(config, config=model.config))
    runs = []
    for stage, new_cache in zip(STAGES[1:], makers, strict=True):
        on_progress(stage, 0)
        _generate(model, tokenizer, inputs, new_cache(), 2, lambda done: None)
        runs.append(_generate(model, tokenizer, inputs, new_cache(), max_new_tokens, partial(on_progress, stage)))
    full, kivi = runs
    index = first_difference(full.token_ids, kivi.token_ids)
    parts = None
    if index is not None:
        pieces = (tokenizer.decode(list(run.token_ids[index : index + 1])) for run in (full, kivi))
        parts = Divergence(index, *map(str, pieces))
    return Comparison(
        model=str(model.name_or_path),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        config=config,
        prompt_tokens=inputs["input_ids"].shape[1],
        max_new_tokens=max_new_tokens,
        full_precision=full,
        kivi=kivi,
        divergence=parts,
    )


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    cache: DynamicCache,
    max_new_tokens: int,
    on_token: Callable[[int], object],
) -> Run:
    clock = _Clock(on_token)
    generate: Any = model.generate
    output: Tensor = generate(
        **inputs,
        **{cache_argument(model): cache},
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    token_ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    start, first, last = clock.times[0], clock.times[1], clock.times[-1]
    pieces = tuple(token_texts(tokenizer, token_ids))
    return Run(_label(cache), tuple(token_ids), pieces, first - start, last - first, _memory(cache))


def _memory(cache: DynamicCache) -> MemoryReport:
    return cache.memory() if isinstance(cache, KIVICache) else sum(map(held_by, cache.layers), MemoryReport())


def _label(cache: DynamicCache) -> str:
    kinds = dict.fromkeys(str(layer.config) for layer in cache.layers if isinstance(layer, KIVILayer))
    return " ".join([type(cache).__name__, *(kinds if len(kinds) < 2 else ["mixed"])])


def as_dict(result: Comparison) -> dict[str, Any]:
    """The comparison as plain values, for JSON. Sizes are in bytes."""
    plain = asdict(result) | {"config": result.config.to_dict()}
    for name, run in (("full_precision", result.full_precision), ("kivi", result.kivi)):
        del plain[name]["pieces"], plain[name]["memory"]["layers"]
        plain[name] |= {"text": run.text, "tokens_per_second": run.tokens_per_second}
        plain[name]["memory"] |= {"total": run.memory.total, "bits_per_value": run.memory.bits_per_value}
    return plain


def render(result: Comparison, console: Console) -> None:
    """Print the comparison: both texts beside each other, where they part, then the figures."""
    parted = result.divergence
    console.print(
        f"{result.model} on {result.device} in {result.dtype}, a prompt of {result.prompt_tokens} tokens, "
        f"at most {result.max_new_tokens} new ones, greedy",
    )
    console.print(_texts(result))
    if parted is None:
        console.print(f"All {len(result.kivi.token_ids)} new tokens are the same.", style="green")
    else:
        console.print(
            f"New tokens alike before the texts part: {parted.index}. At » {parted.full_precision!r} stands against "
            f"{parted.kivi!r}; coloured is what the other text does not have."
        )
    console.print(_figures(result))
    for note in ("One pair of greedy texts is an example, not a measure of quality.", *_notes(result)):
        console.print(note, style="dim")


def _texts(result: Comparison) -> Table:
    from rich import box
    from rich.table import Table

    full, kivi, parted = result.full_precision, result.kivi, result.divergence
    table = Table(full.label, kivi.label, box=box.ROUNDED, expand=True)
    table.columns[0].ratio = table.columns[1].ratio = 1
    blocks = SequenceMatcher(None, full.token_ids, kivi.token_ids, autojunk=False).get_matching_blocks()
    table.add_row(
        _coloured(full.pieces, {block.a + i for block in blocks for i in range(block.size)}, parted, "full_precision"),
        _coloured(kivi.pieces, {block.b + i for block in blocks for i in range(block.size)}, parted, "kivi"),
    )
    return table


def _coloured(pieces: Sequence[str], same: set[int], parted: Divergence | None, side: str) -> Text:
    from rich.text import Text

    text = Text()
    for index, piece in enumerate(pieces):
        if parted and index == parted.index:
            word = piece.lstrip()  # none: a special token, such as an end of text
            text.append(piece.removesuffix(word)).append(f"»{word or getattr(parted, side)}", "bold reverse red")
        else:
            text.append(piece, "" if index in same else "yellow")
    return text


def _figures(result: Comparison) -> Table:
    from rich import box
    from rich.table import Table

    runs = full, kivi = result.full_precision, result.kivi
    table = Table("", full.label, kivi.label, box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    table.add_row("prefill", *(f"{run.prefill_seconds:.2f} s" for run in runs))
    speeds = (run.tokens_per_second for run in runs)
    table.add_row("decode only", *("-" if s is None else f"{s:.1f} tokens/s" for s in speeds))
    table.add_row("tokens cached", *(str(result.prompt_tokens + len(run.token_ids) - 1) for run in runs))
    table.add_section()
    for (label, *texts), (_, text) in zip(full.memory.rows(), kivi.memory.rows(), strict=True):
        cells = ["" if cell in ("0 B", "0.00") else cell.split(" (")[0] for cell in (*texts, text)]
        if any(cells):
            table.add_row(label, *cells, style="bold" if label in ("total", "bits per value") else None)
    return table


def _notes(result: Comparison) -> list[str]:
    full, kivi = result.full_precision.memory, result.kivi.memory
    notes = [f"KIVICache takes {kivi.bits_per_value / full.bits_per_value:.0%} of DynamicCache's bits per value."]
    if not kivi.packed_values:
        notes.append("Nothing was packed: the text is no longer than what stays exact, or no layer is to be packed.")
    if result.device == "cpu":
        notes.append("On a CPU every step unpacks the whole cache: it saves memory, not time.")
    return notes
