"""How close a model stays to full precision when its history is read back from a cache.

A one-shot perplexity would measure nothing, since a prompt attends to its own exact keys and values. So a sequence is
prefilled with its first tokens, and the rest is fed through the cache in steps.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from kivicache.cache import KIVICache
from kivicache.config import KIVIConfig, LayerConfig
from kivicache.layer import KIVILayer

# Packed layers that a CachedKL keeps at the most, on average per layer.
_KEPT_PER_LAYER = 32


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
    model(tokens[:, :prefill], past_key_values=cache, logits_to_keep=1)
    return _fed(model, tokens[:, prefill:-1], cache, step)


@torch.no_grad()
def _fed(model: nn.Module, tokens: Tensor, cache: Cache, step: int) -> Tensor:
    pieces = (model(piece, past_key_values=cache).logits for piece in tokens.split(step, dim=1))
    return torch.cat([logits.float().log_softmax(-1) for logits in pieces], dim=1)


def kl_divergence(exact: Tensor, log_probs: Tensor) -> Tensor:
    """KL(exact || log_probs) of every token, in nats: log probabilities ``[..., vocabulary]`` to ``[...]``."""
    return (exact.exp() * (exact - log_probs)).sum(-1)


def dense(layer: Any) -> tuple[Tensor, Tensor]:
    """The keys and values that a layer of a cache holds, ``[batch, kv_heads, tokens, head_dim]``."""
    return layer.keys, layer.values


class CachedKL:
    """A config's loss: KL to full precision in nats per token, lower is better.

    The prompt attends to its own exact keys and values whatever the config, so it runs once, and each config only
    packs it anew and feeds the tokens behind it. Packed layers are kept, as most configs of a search share them.

    Args:
        model: a causal language model.
        tokens: int64 ``[sequences, tokens]``, all but the first ``prefill`` of each scored.
        prefill: tokens of the one-shot prefill.
        step: tokens of every forward pass behind it.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, prefill: int, step: int):
        self.model, self.tokens, self.prefill, self.step = model, tokens, prefill, step
        self._prompt = KIVICache(KIVIConfig(nbits=16), config=model.config)
        with torch.no_grad():
            model(tokens[:, :prefill], past_key_values=self._prompt, logits_to_keep=1)
        self._packed: dict[tuple[int, str], KIVILayer] = {}
        self._exact = self.log_probs(copy.deepcopy(self._prompt))

    def __call__(self, config: KIVIConfig) -> float:
        """Mean KL(exact || config) over the scored tokens."""
        return kl_divergence(self._exact, self.log_probs(self.cache(config))).mean().item()

    @property
    def layers(self) -> list[int]:
        """The layers that a config decides about."""
        return [idx for idx, layer in enumerate(self._prompt.layers) if isinstance(layer, KIVILayer)]

    def cache(self, config: KIVIConfig) -> KIVICache:
        """A cache that holds the prompts as ``config`` packs them."""
        cache = KIVICache(config, config=self.model.config)
        for idx, layer in enumerate(self._prompt.layers):
            packed = self.layer(idx, config.layer(idx)) if isinstance(layer, KIVILayer) else layer
            cache.layers[idx] = copy.deepcopy(packed)
        return cache

    def layer(self, layer_idx: int, config: LayerConfig) -> KIVILayer:
        """One layer that holds the prompts as ``config`` packs them; not to be added to."""
        key = layer_idx, repr(config)
        if key not in self._packed:
            if len(self._packed) >= _KEPT_PER_LAYER * len(self.layers):
                self._packed.clear()
            self._packed[key] = KIVILayer(config)
            self._packed[key].update(*self.prompt_states(layer_idx))
        return self._packed[key]

    def prompt_states(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """The prompts' exact keys and values, ``[sequences, kv_heads, prefill, head_dim]``."""
        return dense(self._prompt.layers[layer_idx])

    def log_probs(self, cache: Cache) -> Tensor:
        """As [`step_log_probs`], for a cache that holds the prompts."""
        return _fed(self.model, self.tokens[:, self.prefill : -1], cache, self.step)
