"""How close the model stays to full precision: its next-token distributions, and its greedy text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kivicache.data import load_text
from kivicache.fidelity import first_difference, kl_divergence, step_log_probs, text_pieces
from kivicache.tasks.base import Item, Scores, Subject, Task, check_counts, generate


@dataclass(frozen=True)
class Fidelity(Task, name="fidelity"):
    """Perplexity, KL to full precision and agreement of the most likely token, all through the cache.

    Args:
        data: a text file, or a dataset, see [`load_text`]. None: the built-in text.
        sequences: pieces, evenly spread over the text, each behind the BOS token where the model has one.
        prefill: tokens of each that are prefilled at once.
        steps: tokens behind them that are read through the cache, and scored.
        step: tokens per forward pass.
    """

    data: str | None = None
    sequences: int = 4
    prefill: int = 768
    steps: int = 256
    step: int = 32
    needs_exact = True

    def __post_init__(self) -> None:
        check_counts(self, sequences=1, prefill=1, steps=1, step=1)

    def items(self, subject: Subject) -> list[Item]:
        pieces = _pieces(subject, self.data, self.sequences, self.prefill + self.steps + 1)
        return [Item(str(i), piece, self.prefill, {"step": self.step}) for i, piece in enumerate(pieces)]

    def observe(self, subject: Subject, item: Item, cache: Cache) -> Tensor:
        tokens = torch.tensor([item.token_ids], device=subject.model.device)
        return step_log_probs(subject.model, tokens, cache, item.prefill, item.facts["step"])[0]

    def score(self, item: Item, seen: Tensor, exact: Tensor) -> Scores:
        targets = torch.tensor(item.token_ids[item.prefill + 1 :], device=seen.device)
        return {
            "nll": _rounded(-seen.gather(-1, targets[:, None])[:, 0]),
            "kl": _rounded(kl_divergence(exact, seen).clamp_min(0)),
            "same_top": (exact.argmax(-1) == seen.argmax(-1)).int().tolist(),
        }

    def summarize(self, scores: Sequence[Scores]) -> dict[str, float]:
        nll, kl, same = ([value for one in scores for value in one[name]] for name in ("nll", "kl", "same_top"))
        divergences = torch.tensor(kl, dtype=torch.float64)
        return {
            "perplexity": math.exp(fmean(nll)),
            "kl_mean": fmean(kl),
            "kl_median": divergences.quantile(0.5).item(),
            "kl_p99": divergences.quantile(0.99).item(),
            "top1_agreement": fmean(same),
        }


@dataclass(frozen=True)
class Greedy(Task, name="greedy"):
    """How long a greedy continuation stays the one of full precision.

    Args:
        data: as for [`Fidelity`].
        prompts: pieces of the text to continue.
        prefill: tokens of each.
        tokens: how many new ones are generated; an end of text is not allowed to cut them short.
    """

    data: str | None = None
    prompts: int = 4
    prefill: int = 512
    tokens: int = 128
    needs_exact = True

    def __post_init__(self) -> None:
        check_counts(self, prompts=1, prefill=1, tokens=1)

    def items(self, subject: Subject) -> list[Item]:
        pieces = _pieces(subject, self.data, self.prompts, self.prefill + 1)
        return [Item(str(i), piece, self.prefill, {"tokens": self.tokens}) for i, piece in enumerate(pieces)]

    def observe(self, subject: Subject, item: Item, cache: Cache) -> list[int]:
        tokens = item.facts["tokens"]
        return generate(subject, item, cache, max_new_tokens=tokens, min_new_tokens=tokens)

    def score(self, item: Item, seen: list[int], exact: list[int]) -> Scores:
        index = first_difference(exact, seen)
        equal = sum(one == other for one, other in zip(exact, seen, strict=False))
        return {"alike_before": len(exact) if index is None else index, "equal_tokens": equal / len(exact)}


def _pieces(subject: Subject, data: str | None, count: int, length: int) -> list[list[int]]:
    return text_pieces(subject.tokenizer, load_text(data), count, length).tolist()


def _rounded(values: Tensor) -> list[Any]:
    return [float(f"{value:.6g}") for value in values.tolist()]
