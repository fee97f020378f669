"""What a model and its cache will weigh, from the config alone: nothing is loaded, nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticLayer

from kivicache.cache import KIVICache
from kivicache.config import KIVIConfig
from kivicache.fixed import FixedKIVILayer
from kivicache.layer import KIVILayer
from kivicache.memory import format_bytes, held_by

_META = torch.device("meta")
_LONGEST = 2**40  # tokens: beyond any memory


@dataclass(frozen=True)
class Estimate:
    """Bytes of a model and its cache. Activations, and what the CUDA context takes, come on top.

    Attributes:
        batch, context: sequences, and tokens of each, prompt and answer together.
        weights: parameters and buffers of the model.
        cache: the [`KIVICache`], room for more tokens included, as ``memory().total``.
        sixteen_bit: a ``DynamicCache`` of the model's dtype.
        gpu_memory: what there is, or None. The rest is what fits into it with the weights, 0 where they do not:
        largest_batch, largest_context: of the KIVICache, at this context, at this batch.
        largest_batch_sixteen_bit, largest_context_sixteen_bit: of the ``DynamicCache``.
    """

    batch: int
    context: int
    weights: int
    cache: int
    sixteen_bit: int
    gpu_memory: int | None = None
    largest_batch: int | None = None
    largest_batch_sixteen_bit: int | None = None
    largest_context: int | None = None
    largest_context_sixteen_bit: int | None = None

    def rows(self) -> list[tuple[str, str]]:
        """(label, text) rows, for a table."""
        rows = [
            ("weights", format_bytes(self.weights)),
            (f"cache in 16 bits, {self.batch} x {self.context:,} tokens", format_bytes(self.sixteen_bit)),
            (
                f"KIVICache, {self.batch} x {self.context:,} tokens",
                f"{format_bytes(self.cache)} ({self.sixteen_bit / self.cache:.2f}x smaller)",
            ),
        ]
        if self.gpu_memory is not None:
            rows += [
                (f"largest batch in {format_bytes(self.gpu_memory)}, 16 bits", f"{self.largest_batch_sixteen_bit:,}"),
                ("largest batch, KIVICache", f"{self.largest_batch:,}"),
                ("longest context, 16 bits", f"{self.largest_context_sixteen_bit:,} tokens"),
                ("longest context, KIVICache", f"{self.largest_context:,} tokens"),
            ]
        return rows


def estimate(
    model: str | PreTrainedConfig,
    cfg: KIVIConfig | None = None,
    *,
    context: int,
    batch: int = 1,
    gpu_memory: int | None = None,
    fixed: bool = False,
) -> Estimate:
    """Estimate the bytes of a model and of its cache.

    Args:
        model: a config, or a name on the Hugging Face hub, a local folder or a ``config.json``.
        cfg: the cache's settings.
        context: tokens of each sequence.
        batch: sequences.
        gpu_memory: bytes; what fits is then part of the answer.
        fixed: of fixed capacity, ``KIVICache(max_cache_len=context)``.

    Raises:
        ValueError: for a model that cannot be found, or whose cache is not plain keys and values.
    """
    config = model if isinstance(model, PreTrainedConfig) else _load_config(model)
    cfg = KIVIConfig() if cfg is None else cfg

    def packed(context: int) -> int:
        return cache_bytes(config, cfg, context, fixed)

    def sixteen_bit(context: int) -> int:
        return cache_bytes(config, None, context)

    cache, dynamic = batch * packed(context), batch * sixteen_bit(context)
    weights = weight_bytes(config)
    found = Estimate(batch, context, weights, cache, dynamic)
    if gpu_memory is None:
        return found
    room = max(gpu_memory - weights, 0)
    return Estimate(
        batch,
        context,
        weights,
        found.cache,
        found.sixteen_bit,
        gpu_memory,
        largest_batch=room // packed(context),
        largest_batch_sixteen_bit=room // sixteen_bit(context),
        largest_context=_largest(lambda tokens: batch * packed(tokens) <= room),
        largest_context_sixteen_bit=_largest(lambda tokens: batch * sixteen_bit(tokens) <= room),
    )


def weight_bytes(config: PreTrainedConfig) -> int:
    """Bytes of the parameters and buffers of a model with this config, in the config's dtype."""
    with _META:
        model = AutoModelForCausalLM.from_config(config, dtype=_dtype(config))
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def cache_bytes(config: PreTrainedConfig, cfg: KIVIConfig | None, context: int, fixed: bool = False) -> int:
    """Bytes of the cache of one sequence after a prompt of ``context - 1`` tokens and one step; cfg None: 16 bits."""
    config = config.get_text_config(decoder=True)
    if cfg is None:
        layers = DynamicCache(config=config).layers
    else:
        layers = KIVICache(cfg, config=config, max_cache_len=context if fixed else None).layers
    states = _states(config)
    known: dict[Any, int] = {}
    total = 0
    for layer in layers:
        # layers alike are counted once
        kind = type(layer), repr(getattr(layer, "config", None)), getattr(layer, "sliding_window", None)
        if kind not in known:
            known[kind] = _layer_bytes(layer, states, context)
        total += known[kind]
    return total


def _layer_bytes(layer: Any, states: Tensor, context: int) -> int:
    """Bytes of one layer that holds ``context`` tokens, from the very buffers it makes, on the meta device."""
    if isinstance(layer, FixedKIVILayer):
        layer.lazy_initialization(states, states)
        return layer.allocated_nbytes
    if isinstance(layer, KIVILayer):
        layer.pretend(states, context)
        return layer.memory().total
    if type(layer).__name__ == "DummyLayer":  # only newer transformers have it
        return 0
    if not isinstance(layer, (DynamicLayer, StaticLayer)):
        raise ValueError(f"model: has a {type(layer).__name__}, whose size its config does not tell")
    for tokens in (context - 1, 1):
        if tokens:
            layer.update(*(2 * [states.expand(-1, -1, tokens, -1)]))
    return held_by(layer).full_precision


def _states(config: PreTrainedConfig) -> Tensor:
    """Keys, or values, of one token of one sequence, on the meta device."""
    if getattr(config, "kv_lora_rank", None):
        raise ValueError("model: caches latents (multi-head latent attention), whose size differs between versions")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return torch.empty(1, kv_heads, 1, head_dim, dtype=_dtype(config), device=_META)


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    dtype = config.dtype or config.get_text_config(decoder=True).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number of tokens that fits, 0 where not even one does."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < _LONGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _load_config(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"model {name!r} cannot be found: {reason}") from error
