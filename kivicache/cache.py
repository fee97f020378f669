"""[`KIVICache`]: the cache that a model's ``generate`` takes as ``past_key_values``."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, StaticCache, StaticLayer

from kivicache.backends import get_backend
from kivicache.config import PRESETS, KIVIConfig, LayerConfig
from kivicache.fixed import FixedKIVILayer, check_capacity
from kivicache.layer import GROWS, KIVILayer, outside_of_graphs
from kivicache.memory import MemoryReport, format_bytes, held_by

logger = logging.getLogger(__name__)


class KIVICache(DynamicCache):
    """A ``DynamicCache`` that keeps keys and values in 2, 4 or 8 bits (KIVI, arXiv 2402.02750).

    ```python
    model.generate(**inputs, past_key_values=KIVICache(KIVIConfig(nbits=4), config=model.config))
    ```

    Args:
        cfg: a [`KIVIConfig`], a dict of its fields, or a path to a YAML file of them. Default: ``KIVIConfig()``.
        config: the model's own config. With it, full-attention layers are packed and every other layer (sliding
            window, linear attention, KV-shared, ...) is what ``DynamicCache(config=config)`` makes it. Without it,
            every layer is packed, which plain decoders can do with.
        max_cache_len: room for so many tokens, allocated at the first update. ``generate`` then compiles the decode
            step by itself, as with ``StaticCache``. Needs ``config``; a layer of 16 bits is a ``StaticLayer``.
        offloading, offload_only_non_sliding: as for ``DynamicCache``.

    Raises:
        ValueError: naming the setting, what was given and what is allowed.
        ImportError: where the library of a backend is missing, with the command that installs it.
    """

    def __init__(
        self,
        cfg: KIVIConfig | Mapping[Any, Any] | str | Path | None = None,
        *,
        config: PreTrainedConfig | None = None,
        max_cache_len: int | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ):
        self.kivi_config = _as_kivi_config(cfg)
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise ValueError(f"config: got {type(config).__name__}; allowed: the model's own config, model.config")
        for backend in self.kivi_config.backends:
            get_backend(backend)  # a missing library is said here, not in the middle of a generation
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        self._is_fixed = max_cache_len is not None
        self._model_config = None if config is None else config.get_text_config(decoder=True)
        if max_cache_len is not None:
            self._fix_capacity(config, max_cache_len, offloading)
        elif config is None:
            # called as a class would be; not a bound method, which would keep the cache alive in a reference cycle
            self.layer_class_to_replicate = _NextLayer(self.kivi_config, self.layers)  # type: ignore[assignment]
        else:
            self._pack(DynamicLayer, KIVILayer)

    def _fix_capacity(self, config: PreTrainedConfig | None, max_cache_len: int, offloading: bool) -> None:
        if config is None:
            raise ValueError(
                "max_cache_len: the cache must know the model's layers: pass KIVICache(..., config=model.config)"
            )
        check_capacity(max_cache_len)
        if offloading:
            raise ValueError("offloading: got True; allowed with max_cache_len: False")

        def fixed(layer_config: LayerConfig) -> StaticLayer | FixedKIVILayer:
            if {layer_config.nbits_key, layer_config.nbits_value} == {16} and not layer_config.heads:
                return StaticLayer(max_cache_len)
            return FixedKIVILayer(layer_config, max_cache_len, self._model_config)

        try:
            self.layers = StaticCache(config=config, max_cache_len=max_cache_len).layers
        except KeyError as error:
            raise ValueError(f"max_cache_len: transformers has no layer of fixed capacity for {error}") from error
        self._pack(StaticLayer, fixed)
        # one mask for all full-attention layers; BLOOM's, of two dimensions, comes in this length whatever it is told
        is_shared = any(isinstance(layer, StaticLayer) and not layer.is_sliding for layer in self.layers)
        for layer in self.layers:
            if isinstance(layer, FixedKIVILayer):
                layer.pads_prompt = is_shared or config.model_type == "bloom"

    def _pack(self, kind: type[Any], packed: Callable[[LayerConfig], Any]) -> None:
        """Replace the model's full-attention layers, which are of exactly this kind."""
        packable = [idx for idx, layer in enumerate(self.layers) if type(layer) is kind]
        for name in ("layers", "heads"):
            refused = sorted(set(getattr(self.kivi_config, name)) - set(packable))
            if refused:
                raise ValueError(
                    f"{name}: got layer {refused[0]}; allowed: {packable}, the model's {len(packable)} full-attention "
                    f"layers of {len(self.layers)}"
                )
        for layer_idx in packable:
            self.layers[layer_idx] = packed(self.kivi_config.layer(layer_idx))
        if not packable:
            logger.warning("KIVICache packs nothing: the model has no full-attention layer, only %s", self._kinds())

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the decode step: with ``max_cache_len``, where every layer allows it.

        A growing cache has no fixed shapes. (Without this, an all-linear model would be compiled.)
        """
        return self._is_fixed and super().is_compileable

    def memory(self) -> MemoryReport:
        """True bytes held, in sum and in ``.layers`` one by one, see [`MemoryReport`]."""
        layers = tuple(layer.memory() if isinstance(layer, KIVILayer) else held_by(layer) for layer in self.layers)
        return replace(sum(layers, MemoryReport()), layers=layers)

    def explain(self) -> dict[int, str]:
        """What each layer's decode attention reads: "packed" bytes, fused, or "dense" tensors and the reasons why.

        With ``config=model.config`` the model's attention implementation, too, can be a reason.
        """
        explained = {}
        for layer_idx, layer in enumerate(self.layers):
            if isinstance(layer, KIVILayer):
                reasons = "; ".join([*layer.dense_reasons(), *self._attention_reasons()])
                explained[layer_idx] = f"dense: {reasons}" if reasons else "packed"
            else:
                explained[layer_idx] = f"{type(layer).__name__}: left as it is"
        return explained

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many tokens a layer's next ``query_length`` ones will see, and from which on.

        A ``StaticLayer``, of 16 bits, takes any number of tokens; so a packed layer is asked whether they fit.

        Raises:
            ValueError: where they do not.
        """
        if self._is_fixed and type(self.layers[layer_idx]) is StaticLayer:
            for layer in self.layers:
                if isinstance(layer, FixedKIVILayer):
                    layer.get_mask_sizes(query_length)
                    break
        return super().get_mask_sizes(query_length, layer_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse_a_layer_without("batch_repeat_interleave")
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._refuse_a_layer_without("batch_select_indices")
        super().batch_select_indices(indices)

    def _refuse_a_layer_without(self, method: str) -> None:
        """All layers or none: those of 16 bits and fixed capacity, among others, cannot change their batch."""
        for layer_idx, layer in enumerate(self.layers):
            if not hasattr(layer, method):
                raise ValueError(
                    f"{method}: layer {layer_idx}, a {type(layer).__name__}, cannot; no layer was changed"
                )

    def _attention_reasons(self) -> list[str]:
        """Why the model's attention does not read packed bytes; empty where it does, or is not known."""
        name = getattr(self._model_config, "_attn_implementation", None)
        if name is None or name == "kivi" or (name == "sdpa" and not self._is_fixed):
            return []
        where = "in a compiled step " if name == "sdpa" else ""
        return [f'{where}the attention "{name}" sees dense tensors: model.set_attn_implementation("kivi")']

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        self._refuse_without_config("keeps convolution states")
        return super().get_conv_state(*args, **kwargs)

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        self._refuse_without_config("keeps recurrent states")
        return super().get_recurrent_state(*args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self._refuse_without_config("keeps convolution states")
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self._refuse_without_config("keeps recurrent states")
        return super().update_recurrent_state(*args, **kwargs)

    def update_indexer(self, *args: Any, **kwargs: Any) -> Tensor:
        self._refuse_without_config("keeps indexer keys")
        return super().update_indexer(*args, **kwargs)

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        self._refuse_without_config("keeps linear-attention states")
        return super().has_previous_state(*args, **kwargs)

    def _refuse_without_config(self, what: str) -> None:
        if self.layer_class_to_replicate is not None:
            raise ValueError(
                f"this model {what}, so the cache must know its layers: pass KIVICache(..., config=model.config)"
            )

    def _kinds(self) -> str:
        """The layers by kind: "28 x K4V2 g32, 4 x DynamicSlidingWindowLayer"."""
        kinds = Counter(
            str(layer.config) if isinstance(layer, KIVILayer) else type(layer).__name__ for layer in self.layers
        )
        return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())

    def __repr__(self) -> str:
        if not self.layers:
            return f"{type(self).__name__}({self.kivi_config.layer(0)}, empty)"
        try:
            memory = self.memory()
        except ValueError as error:  # more compiled steps than there was room for
            return f"{type(self).__name__}({self._kinds()}; {error})"
        kinds = DynamicLayer, StaticLayer
        lengths = (layer.get_seq_length() for layer in self.layers if isinstance(layer, kinds))
        tokens = max(map(int, lengths), default=0)
        size = f"{format_bytes(memory.total)}, {memory.bits_per_value:.2f} bits per value"
        return f"{type(self).__name__}({self._kinds()}; {tokens} tokens, {size})"


@dataclass
class _NextLayer:
    """Makes the layers of a cache that does not know its model, one by one, with the settings of their index."""

    kivi_config: KIVIConfig
    layers: list[Any]

    @outside_of_graphs(GROWS)
    def __call__(self) -> KIVILayer:
        return KIVILayer(self.kivi_config.layer(len(self.layers)))


def _as_kivi_config(cfg: Any) -> KIVIConfig:
    if cfg is None:
        return KIVIConfig()
    if isinstance(cfg, KIVIConfig):
        return cfg
    if isinstance(cfg, Mapping):
        return KIVIConfig.from_dict(cfg)
    if isinstance(cfg, (str, Path)):
        if cfg in PRESETS:
            raise ValueError(f"cfg: got {cfg!r}; allowed: KIVIConfig.preset({cfg!r}), or a path to a YAML file")
        return KIVIConfig.from_yaml(cfg)
    hint = "; the model's own config goes to config=" if isinstance(cfg, PreTrainedConfig) else ""
    raise ValueError(f"cfg: got {type(cfg).__name__}; allowed: a KIVIConfig, a dict, or a path to a YAML file{hint}")
