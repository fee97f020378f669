"""How close a model stays to full precision when its history is read back from a cache.

A one-shot perplexity would measure nothing, since a prompt attends to its own exact keys and values. So a sequence is
prefilled with its first tokens, and the rest is fed through the cache in steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedTokenizerBase


def text_pieces(tokenizer: PreTrainedTokenizerBase, text: str, pieces: int, length: int) -> Tensor:
    """``[pieces, length]``: pieces evenly spread over a text, each behind what the tokenizer begins a text with.

    That is a BOS token for most models, which attend to it as their sink and fail without it.

    Raises:
        ValueError: where the text is too short.
    """
    begin = torch.tensor(_beginning(tokenizer), dtype=torch.long)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)
    own = spread_sequences(tokens, pieces, length - len(begin))
    return torch.cat([begin.expand(pieces, -1), own], dim=1)


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that come before the first one of any text."""
    whole, bare = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    return whole[: next(starts, 0)]


def spread_sequences(tokens: Tensor, sequences: int, length: int) -> Tensor:
    """``sequences`` pieces of ``length`` tokens each, evenly spread over a text ``[tokens]``, never overlapping.

    Raises:
        ValueError: where the text is too short.
    """
    if len(tokens) < sequences * length:
        raise ValueError(f"text: got {len(tokens)} tokens; allowed: at least {sequences * length}")
    starts = torch.linspace(0, len(tokens) - length, sequences).long().tolist()
    return torch.stack([tokens[start : start + length] for start in starts])


@torch.no_grad()
def step_log_probs(model: nn.Module, tokens: Tensor, cache: Cache, prefill: int, step: int) -> Tensor:
    """Log probabilities of the tokens behind the first ``prefill``, each seen through the cache.

    Args:
        model: a causal language model.
        tokens: int64 ``[batch, tokens]``.
        cache: an empty cache for it.
        prefill: tokens of the one-shot prefill.
        step: tokens of every forward pass behind it.

    Returns:
        float32 ``[batch, tokens - prefill - 1, vocabulary]``: position ``i`` predicts ``tokens[:, prefill + 1 + i]``.
    """
    model(tokens[:, :prefill], **{cache_argument(model): cache}, logits_to_keep=1)
    return fed_log_probs(model, tokens[:, prefill:-1], cache, step)


@torch.no_grad()
def fed_log_probs(model: nn.Module, tokens: Tensor, cache: Cache, step: int) -> Tensor:
    """Log probabilities behind every token ``[batch, tokens]``, ``step`` at a time fed to a cache with a prompt."""
    pieces = (model(piece, **{cache_argument(model): cache}).logits for piece in tokens.split(step, dim=1))
    return torch.cat([logits.float().log_softmax(-1) for logits in pieces], dim=1)


def cache_argument(model: nn.Module) -> str:
    """What ``forward`` and ``generate`` call the cache: ``past_key_values``, or ``cache`` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def kl_divergence(exact: Tensor, log_probs: Tensor) -> Tensor:
    """KL(exact || log_probs) of every token, in nats: log probabilities ``[..., vocabulary]`` to ``[...]``."""
    return (exact.exp() * (exact - log_probs)).sum(-1)


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The first index at which two sequences differ or only one has ended; None where they are equal."""
    pairs = enumerate(zip_longest(first, second))
    return next((index for index, (one, other) in pairs if one != other), None)
