"""What a model and its cache will weigh, from the config alone: nothing is loaded, nothing is allocated."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from kivicache.cache import KIVICache
from kivicache.config import KIVIConfig, LayerConfig
from kivicache.fidelity import cache_argument
from kivicache.fixed import FixedKIVILayer
from kivicache.layer import KIVILayer
from kivicache.memory import format_bytes, size_against
from kivicache.models import check_decoder, load_config
from kivicache.policy import packed_lengths

_META = torch.device("meta")
_LONGEST = 2**40  # tokens, or sequences: beyond any memory
# whose bytes follow from the shape of a token; of these classes exactly, as others keep more
_LAYERS = (KIVILayer, FixedKIVILayer, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


@dataclass(frozen=True)
class Estimate:
    """Bytes of a model and its cache. Activations, and what the CUDA context takes, come on top.

    Attributes:
        batch, context: sequences, and tokens of each, prompt and answer together.
        dtype: of the model, as the config says ("bfloat16" where it says nothing).
        weights: parameters and buffers of the model, in this dtype.
        cache: the [`KIVICache`] after a prompt and one step, room for more tokens included, as ``memory().total``. The
            room depends on how the tokens came: after many steps it is up to 8 % less or 5 % more than this.
        full_precision: a ``DynamicCache`` of this dtype.
        gpu_memory: what there is, or None. The rest is what fits into it with the weights, 0 where they do not:
        largest_batch, largest_context: of the KIVICache, at this context, at this batch; shorter contexts fit, too.
        largest_batch_full_precision, largest_context_full_precision: of the ``DynamicCache``.
        quantization: what the model's weights are quantized by, or None. They take less than ``weights``, and more
            fits than is said here.
    """

    batch: int
    context: int
    dtype: str
    weights: int
    cache: int
    full_precision: int
    gpu_memory: int | None = None
    largest_batch: int | None = None
    largest_batch_full_precision: int | None = None
    largest_context: int | None = None
    largest_context_full_precision: int | None = None
    quantization: str | None = None

    def rows(self) -> list[tuple[str, str]]:
        """(label, text) rows, for a table."""
        weights, least = ("weights", format_bytes(self.weights)), ""
        if self.quantization is not None:
            weights, least = ("weights, unquantized", f"{weights[1]} ({self.quantization} takes less)"), "at least "
        rows = [
            weights,
            (f"cache in {self.dtype}, {self.batch} x {self.context:,} tokens", format_bytes(self.full_precision)),
            (
                f"KIVICache, {self.batch} x {self.context:,} tokens",
                f"{format_bytes(self.cache)} ({size_against(self.cache, self.full_precision)})",
            ),
        ]
        if self.gpu_memory is not None:
            rows += [
                (
                    f"largest batch in {format_bytes(self.gpu_memory)}, {self.dtype}",
                    f"{least}{self.largest_batch_full_precision:,}",
                ),
                ("largest batch, KIVICache", f"{least}{self.largest_batch:,}"),
                (f"longest context, {self.dtype}", f"{least}{self.largest_context_full_precision:,} tokens"),
                ("longest context, KIVICache", f"{least}{self.largest_context:,} tokens"),
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
        ValueError: for a model that cannot be loaded, no decoder, or one that caches more than plain keys and values.
    """
    for name, value in (("context", context), ("batch", batch)):
        if type(value) is not int or not 1 <= value <= _LONGEST:
            raise ValueError(f"{name}: got {value!r}; allowed: a whole number from 1 to {_LONGEST}")
    config = model if isinstance(model, PreTrainedConfig) else load_config(model)
    cfg = KIVIConfig() if cfg is None else cfg
    shell = _shell(config)
    token, weights = _one_token(shell), weight_bytes(shell)

    def packed(context: int) -> int:
        return cache_bytes(config, token, cfg, context, fixed)

    layers = (
        [] if fixed else [layer.config for layer in KIVICache(cfg, config=config).layers if type(layer) is KIVILayer]
    )

    def most(context: int) -> int:
        """While the cache grows to this context: packing a block makes it smaller."""
        return max(map(packed, {context, *(_last_peak(layer, context) for layer in layers)}))

    def full(context: int) -> int:
        return cache_bytes(config, token, None, context)

    found = Estimate(
        batch,
        context,
        str(shell.dtype).removeprefix("torch."),
        weights,
        batch * packed(context),
        batch * full(context),
        quantization=_quantization(config),
    )
    if gpu_memory is None:
        return found
    room = max(gpu_memory - weights, 0)
    return replace(
        found,
        gpu_memory=gpu_memory,
        largest_batch=room // packed(context),
        largest_batch_full_precision=room // full(context),
        largest_context=_largest(lambda tokens: batch * most(tokens) <= room),
        largest_context_full_precision=_largest(lambda tokens: batch * full(tokens) <= room),
    )


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def cache_bytes(
    config: PreTrainedConfig, token: Sequence[Any], cfg: KIVIConfig | None, context: int, fixed: bool = False
) -> int:
    """Bytes of the cache of one sequence after a prompt of ``context - 1`` tokens and one step.

    Args:
        token: the layers of a ``DynamicCache`` that holds one token, on the meta device.
        cfg: None: a ``DynamicCache``.
    """
    if cfg is None:
        layers = DynamicCache(config=config).layers
    else:
        layers = KIVICache(cfg, config=config, max_cache_len=context if fixed else None).layers
    known: dict[Any, int] = {}
    total = 0
    for layer, held in zip(layers, token, strict=True):
        if type(layer).__name__ == "DummyLayer":  # only newer transformers have it
            continue
        if type(layer) not in _LAYERS:
            raise ValueError(f"model: has a {type(layer).__name__}, whose size its config does not tell")
        # layers alike are counted once
        window, shapes = getattr(layer, "sliding_window", None), (held.keys.shape, held.values.shape)
        kind = type(layer), repr(getattr(layer, "config", None)), window, shapes
        if kind not in known:
            known[kind] = _layer_bytes(layer, held.keys, held.values, context)
        total += known[kind]
    return total


def _last_peak(config: LayerConfig, context: int) -> int:
    """The last length up to ``context`` behind which the layer packs keys, or ``context`` where it packs none."""
    packed = packed_lengths(config, context)[0]
    first = bisect_left(range(context), packed, key=lambda length: packed_lengths(config, length)[0])
    return max(first - 1, 1) if packed else context


def _layer_bytes(layer: Any, keys: Tensor, values: Tensor, context: int) -> int:
    """Bytes of one layer that holds ``context`` tokens, from the very buffers it makes, on the meta device."""
    if isinstance(layer, FixedKIVILayer):
        layer.lazy_initialization(keys, values)
        return layer.allocated_nbytes
    if isinstance(layer, KIVILayer):
        layer.pretend(keys, values, context)
        return layer.memory().total
    for tokens in (context - 1, 1):
        if tokens:
            layer.update(*(states.expand(-1, -1, tokens, -1) for states in (keys, values)))
    return sum(states.untyped_storage().nbytes() for states in (layer.keys, layer.values))


def _shell(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of this config on the meta device, where nothing takes memory."""
    check_decoder(config)
    with _META:
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=_dtype(config))
    model.set_experts_implementation("batched_mm")  # the way through experts that does not depend on the tokens
    return model.eval()


@torch.no_grad()
def _one_token(shell: PreTrainedModel) -> Sequence[Any]:
    """The layers of a ``DynamicCache`` that holds one token: what a model caches, its config alone does not say."""
    cache = DynamicCache(config=shell.config)
    try:
        shell(torch.ones(1, 1, dtype=torch.long, device=_META), **{cache_argument(shell): cache})
    except RuntimeError as error:
        raise ValueError(
            f"model: what a {shell.config.model_type} caches cannot be seen without its weights; allowed: a model "
            f"that runs on the meta device ({str(error).splitlines()[0]})"
        ) from error
    return cache.layers


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


def _quantization(config: PreTrainedConfig) -> str | None:
    """What the weights are quantized by, as the config says."""
    for own in (config, config.get_text_config(decoder=True)):
        if quantization := getattr(own, "quantization_config", None):
            plain = quantization if isinstance(quantization, dict) else quantization.to_dict()
            method = plain.get("quant_method", "bitsandbytes")  # whose oldest configs do not name it
            return str(getattr(method, "value", method))
    return None
