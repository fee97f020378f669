"""How much each layer or kv head suffers from each choice of bits: KVTuner's errors (arXiv 2502.04420, section 4).

One layer at a time is packed, so no error comes from the layers below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kivicache.config import KIVIConfig
from kivicache.fidelity import cache_argument
from kivicache.objectives import CachedKL, read_states

Unit = tuple[int, int | None]  # a layer, or a layer and one of its kv heads
NBITS = (2, 4, 8)
_RECORDING = "kivi_recording"


@dataclass(frozen=True)
class Choice:
    """What may be chosen for a unit.

    Attributes:
        nbits_key, nbits_value: bits of keys and values.
        group_size: None: group size and rotation stay the layer's own, as they do for heads, which choose bits alone.
        rotation: of keys and values.
    """

    nbits_key: int
    nbits_value: int
    group_size: int | None = None
    rotation: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in (self.pair, self.group_size and f"g{self.group_size}", self.rotation) if word)

    @property
    def pair(self) -> str:
        return f"K{self.nbits_key}V{self.nbits_value}"

    @property
    def settings(self) -> dict[str, Any]:
        """As fields of a config."""
        bits = {"nbits_key": self.nbits_key, "nbits_value": self.nbits_value}
        return bits if self.group_size is None else bits | {"group_size": self.group_size, "rotation": self.rotation}


@dataclass(frozen=True)
class Sensitivity:
    """What one choice costs one unit.

    Attributes:
        bits: true bits per value, scales and minima included.
        values: how many values the unit caches, by which its bits weigh in the average.
        e_k, e_v: error of the keys and of the values, relative to their mean magnitude.
        e_a: mean absolute error of the attention probabilities.
        e_o: error of the attention's output, relative to its mean magnitude. (The paper divides value by value, where
            the nearly-zero ones decide; here the two means are divided.)
        loss: the model's loss where this unit alone is packed. None: not measured, as the choice was pruned.
    """

    bits: float
    values: int
    e_k: float
    e_v: float
    e_a: float
    e_o: float
    loss: float | None = None


Profile = dict[Unit, dict[Choice, Sensitivity]]


def choices(
    group_sizes: Sequence[int | None], rotations: Sequence[str | None], nbits: Sequence[int] = NBITS
) -> list[Choice]:
    """Every choice of key bits, value bits, group size and rotation."""
    return [Choice(*chosen) for chosen in product(nbits, nbits, group_sizes, rotations)]


def assigned(base: KIVIConfig, assignment: Mapping[Unit, Choice]) -> KIVIConfig:
    """``base`` with every unit of ``assignment`` set to its choice."""
    settings = base.to_dict()
    for (layer_idx, head), choice in assignment.items():
        if head is None:
            settings["layers"][layer_idx] = settings["layers"].get(layer_idx, {}) | choice.settings
            settings["heads"].pop(layer_idx, None)
        else:
            settings["heads"].setdefault(layer_idx, {})[head] = choice.settings
    return KIVIConfig.from_dict(settings)


def unpacked(base: KIVIConfig) -> KIVIConfig:
    """``base`` with 16 bits everywhere, in its own layers and heads too."""
    settings = base.to_dict() | {"nbits_key": 16, "nbits_value": 16, "heads": {}}
    settings["layers"] = {
        layer_idx: {name: value for name, value in own.items() if name not in ("nbits_key", "nbits_value")}
        for layer_idx, own in base.layers.items()
    }
    return KIVIConfig.from_dict(settings)


@torch.no_grad()
def profile_errors(
    fidelity: CachedKL,
    base: KIVIConfig,
    candidates: Sequence[Choice],
    per_head: bool = False,
    kept: Callable[[int, Callable[[], Profile]], Profile] = lambda layer_idx, measure: measure(),
) -> Profile:
    """The errors of every layer, or every kv head, under every choice.

    Args:
        fidelity: holds the model and the texts; the queries are those of the tokens behind its prefill.
        base: all settings that a choice does not name.
        kept: gives each layer's part, be it measured now or at another time.
    """
    inputs = cache(lambda: _attention_inputs(fidelity))  # of all layers at once, where one is measured

    def measure(layer_idx: int) -> Profile:
        return _layer_errors(fidelity, layer_idx, inputs()[layer_idx], base, candidates, per_head)

    profile: Profile = {}
    for layer_idx in fidelity.layers:
        profile |= kept(layer_idx, partial(measure, layer_idx))
    return profile


def _layer_errors(
    fidelity: CachedKL,
    layer_idx: int,
    recorded: _AttentionInputs,
    base: KIVIConfig,
    candidates: Sequence[Choice],
    per_head: bool,
) -> Profile:
    profile: Profile = {}
    exact = _attended(recorded, recorded.key, recorded.value)
    for choice in candidates:
        layer = fidelity.layer(layer_idx, assigned(base, {(layer_idx, None): choice}).layer(layer_idx))
        keys, values = (
            torch.cat([read, states[:, :, fidelity.prefill :]], dim=2)
            for read, states in zip(read_states(layer), (recorded.key, recorded.value), strict=True)
        )
        per_kv_head = _errors(recorded, keys, values, exact, _attended(recorded, keys, values))
        memory = layer.memory()
        heads: Sequence[int | None] = range(len(per_kv_head)) if per_head else [None]
        packed = memory.packed_bits_per_value, memory.values // len(heads)
        for head in heads:
            errors = per_kv_head.mean(0) if head is None else per_kv_head[head]
            profile.setdefault((layer_idx, head), {})[choice] = Sensitivity(*packed, *errors.tolist())
    return profile


@dataclass(frozen=True)
class _AttentionInputs:
    """What one layer's attention saw: query ``[batch, heads, new_tokens, head_dim]``, all keys and values, exact."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


def _attention_inputs(fidelity: CachedKL) -> dict[int, _AttentionInputs]:
    """The inputs of every packable layer's attention, for the tokens behind the prefill, fed at once."""
    inputs: dict[int, _AttentionInputs] = {}

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        if module.layer_idx in fidelity.layers:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            inputs[module.layer_idx] = _AttentionInputs(query, key, value, scaling)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    with _attention(fidelity.model, record):
        exact = {cache_argument(fidelity.model): fidelity.cache(KIVIConfig(nbits=16))}
        fidelity.model(fidelity.tokens[:, fidelity.prefill : -1], **exact, logits_to_keep=1)
    if missing := [idx for idx in fidelity.layers if idx not in inputs]:
        raise ValueError(
            f"model: the attention of {type(fidelity.model).__name__}'s layers {missing} cannot be seen; allowed: "
            "models that look their attention up in transformers' AttentionInterface"
        )
    return inputs


@contextmanager
def _attention(model: PreTrainedModel, function: Callable[..., Any]) -> Iterator[None]:
    """Let ``model`` attend by ``function``."""
    before = model.config._attn_implementation
    AttentionInterface.register(_RECORDING, function)
    AttentionMaskInterface.register(_RECORDING, sdpa_mask)
    model.set_attn_implementation(_RECORDING)
    try:
        yield
    finally:
        model.set_attn_implementation(before or "sdpa")
        AttentionInterface.register(_RECORDING, sdpa_attention_forward)  # lets go of the recorded tensors


def _attended(inputs: _AttentionInputs, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention probabilities ``[batch, kv_heads, groups, new_tokens, tokens]``, and outputs, causal."""
    query = inputs.query.float().unflatten(1, (keys.shape[1], -1))
    new, tokens = query.shape[-2], keys.shape[2]
    scores = query @ keys.float()[:, :, None].transpose(-1, -2) * inputs.scaling
    future = torch.ones(new, tokens, dtype=torch.bool, device=keys.device).triu(tokens - new + 1)
    probabilities = scores.masked_fill_(future, -torch.inf).softmax(-1)
    return probabilities, probabilities @ values.float()[:, :, None]


def _errors(
    inputs: _AttentionInputs,
    keys: Tensor,
    values: Tensor,
    exact: tuple[Tensor, Tensor],
    read: tuple[Tensor, Tensor],
) -> Tensor:
    """e_k, e_v, e_a, e_o of every kv head: ``[kv_heads, 4]``."""
    return torch.stack(
        [
            _relative(inputs.key, keys),
            _relative(inputs.value, values),
            _by_head(exact[0] - read[0]),
            _relative(exact[1], read[1]),
        ],
        dim=1,
    )


def _relative(exact: Tensor, read: Tensor) -> Tensor:
    return _by_head(exact.float() - read.float()) / _by_head(exact.float()).clamp_min(1e-12)


def _by_head(x: Tensor) -> Tensor:
    return x.abs().transpose(0, 1).flatten(1).mean(1)
