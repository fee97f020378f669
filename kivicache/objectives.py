"""What a search of settings minimizes: a config's loss, less is better."""

from __future__ import annotations

import copy
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from kivicache.cache import KIVICache
from kivicache.caches import CacheSpec
from kivicache.config import KIVIConfig, LayerConfig
from kivicache.evaluation import evaluate
from kivicache.fidelity import cache_argument, fed_log_probs, kl_divergence
from kivicache.layer import KIVILayer
from kivicache.tasks import Subject, Task

# Packed layers that a CachedKL keeps at the most, on average per layer.
_KEPT_PER_LAYER = 32


class CachedKL:
    """KL to full precision, in nats per token.

    The prompt attends to its own exact keys and values whatever the config, so it runs once, and each config only
    packs it anew and feeds the tokens behind it. Packed layers are kept, as most configs of a search share them.

    Args:
        model: a causal language model.
        tokens: int64 ``[sequences, tokens]``; those behind the first ``prefill + 1`` of each are scored.
        prefill: tokens of the one-shot prefill.
        step: tokens of every forward pass behind it.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, prefill: int, step: int):
        self.model, self.tokens, self.prefill, self.step = model, tokens, prefill, step
        self._prompt = KIVICache(KIVIConfig(nbits=16), config=model.config)
        with torch.no_grad():
            model(tokens[:, :prefill], **{cache_argument(model): self._prompt}, logits_to_keep=1)
        self._packed: dict[tuple[int, str], KIVILayer] = {}
        self._exact = self._log_probs(copy.deepcopy(self._prompt))

    def __call__(self, config: KIVIConfig) -> float:
        """Mean KL(exact || config) over the scored tokens."""
        return kl_divergence(self._exact, self._log_probs(self.cache(config))).mean().item()

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
        return read_states(self._prompt.layers[layer_idx])

    def _log_probs(self, cache: Cache) -> Tensor:
        return fed_log_probs(self.model, self.tokens[:, self.prefill : -1], cache, self.step)


def read_states(layer: Any) -> tuple[Tensor, Tensor]:
    """The keys and values that a layer of a cache holds, ``[batch, kv_heads, tokens, head_dim]``."""
    return layer.keys, layer.values


class TaskErrors:
    """The part of a task, GSM8K for one, that the model fails: 1 minus the task's first metric.

    Its ``name`` holds a digest of what is asked, so that a study is not resumed with other questions.

    Raises:
        ValueError: where the task compares with full precision instead of counting right answers, or its data cannot
            be asked.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task):
        if task.needs_exact:
            raise ValueError(f"task: got {task.label!r}; allowed: a task with right answers, such as gsm8k:data=FILE")
        evaluate(model, tokenizer, [], [task])  # says now what is wrong with the task's data
        digests = "".join(item.digest for item in task.items(Subject(model, tokenizer)))
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.name = f"{task} with items {sha256(digests.encode()).hexdigest()[:16]}"

    def __call__(self, config: KIVIConfig) -> float:
        spec = CacheSpec("candidate", "kivi", config.to_dict())
        [result] = evaluate(self.model, self.tokenizer, [spec], [self.task])
        return 1 - next(iter(result.task.summarize([dict(record.scores) for record in result.records]).values()))
