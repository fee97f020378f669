"""Caches by name: [`CacheSpec`] reads settings such as ``kivi:2:hadamard``, builds the cache, and says what it weighs.

dynamic                      full precision, transformers' DynamicCache
kivi                         KIVICache with its defaults
kivi:2   kivi:k4v2           bits of both, or of keys and values
kivi:2:g64:r32:s4            groups of 64, a residual of 32, 4 sinks
kivi:2:hadamard   kivi:4:hqq rotation, backend
kivi:3bit   kivi:3bit:r64    a preset of KIVIConfig, or with a field of its own
kivi:nbits=2,rotation=null   any field of KIVIConfig by its name, but layers and heads
paper:2                      KIVI to the letter; takes what kivi takes
my-model.yaml                a KIVIConfig, or a KVTuner preset, from a file
hf-quanto:4   hf-hqq:2       transformers' QuantizedCache, with its defaults for the rest
hf-hqq:4:g32:r64:axis_key=1  its arguments, g for q_group_size and r for residual_length
hf-fp8                       its 8-bit floats, which take no options
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, QuantizedCache

from kivicache.cache import KIVICache
from kivicache.config import CHOICES, PAPER, PRESETS, KIVIConfig
from kivicache.memory import held_by

NOTHING_PACKED = 16.0  # the bits of a packed value where all are exact
_HF_FIELDS = ("nbits", "axis_key", "axis_value", "q_group_size", "residual_length")
_DISTRIBUTIONS = {"hqq": "hqq", "quanto": "optimum-quanto"}
_WORD_FIELDS = {"g": "group_size", "r": "residual_length", "s": "sink_length"}
_ALLOWED = "dynamic, kivi[:OPTIONS], paper:BITS[:OPTIONS], hf-quanto[:OPTIONS], hf-hqq[:OPTIONS], hf-fp8, a .yaml file"


@dataclass(frozen=True)
class CacheSpec:
    """A kind of cache with its settings.

    Attributes:
        name: what tables and plots call it.
        kind: "dynamic", "kivi", "quanto", "hqq" or "fp8", the last three being transformers' ``QuantizedCache``.
        settings: all fields of the ``KIVIConfig``, or the arguments of the ``QuantizedCache``.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> CacheSpec:
        """Read a setting in the grammar of this module.

        Raises:
            ValueError: naming the setting, what was given and what is allowed.
        """
        try:
            if Path(text).suffix in (".yaml", ".yml"):
                return cls(text, "kivi", _from_file(text).to_dict())
            head, words, fields = split_options(text)
            if head in ("kivi", "paper"):
                base = PAPER if head == "paper" else {}
                return cls(text, "kivi", KIVIConfig.from_dict(base | _kivi_settings(words, fields)).to_dict())
            if head in ("hf-quanto", "hf-hqq"):
                return cls(text, head.removeprefix("hf-"), _hf_settings(words, fields))
            if head in ("dynamic", "hf-fp8") and not words and not fields:
                return cls(text, head.removeprefix("hf-"), {})
        except ValueError as error:
            raise ValueError(f"cache {text!r}: {error}") from None
        raise ValueError(f"cache: got {text!r}; allowed: {_ALLOWED}")

    @cached_property
    def libraries(self) -> dict[str, str]:
        """The versions of the quantization libraries that it calls."""
        used = KIVIConfig.from_dict(self.settings).backends if self.kind == "kivi" else {self.kind}
        return {name: metadata.version(name) for key, name in _DISTRIBUTIONS.items() if key in used}

    def new(self, config: PreTrainedConfig) -> Cache:
        """An empty cache of this kind for the model with this config."""
        if self.kind == "dynamic":
            return DynamicCache(config=config)
        if self.kind == "kivi":
            return KIVICache(self.settings, config=config)
        try:
            return QuantizedCache(self.kind, config, **self.settings)
        except ValueError as error:
            raise ValueError(f"cache {self.name!r}: {error}") from error


def split_options(text: str) -> tuple[str, list[str], dict[str, Any]]:
    """``"head:word:field=value,field=[1,2]"`` as its head, its words, and its fields, whose values are YAML."""
    head, *options = re.split(r"[:,](?![^\[]*\])", text)
    words = [option for option in options if "=" not in option]
    pairs = [option.split("=", 1) for option in options if "=" in option]
    return head, words, _merged(*({name: _value(name, text)} for name, text in pairs))


def _value(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{name}: got {text!r}; allowed: a YAML value, such as 2, null or [1,2]") from None


def _from_file(path: str) -> KIVIConfig:
    try:
        return KIVIConfig.from_yaml(path)
    except OSError as error:
        raise ValueError(f"{error.strerror}") from error


def _kivi_settings(words: list[str], fields: dict[str, Any]) -> dict[str, Any]:
    """What is given, over the fields of the preset that is named, if any."""
    named = _merged(*map(_kivi_word, words))
    preset = PRESETS.get(named.pop("preset", ""), {})
    return preset | _merged(named, fields)


def _kivi_word(word: str) -> dict[str, Any]:
    if word in CHOICES["rotation"]:
        return {"rotation": word}
    if word in CHOICES["backend"]:
        return {"backend": word}
    if word in PRESETS:
        return {"preset": word}
    if pair := re.fullmatch(r"k(\d+)v(\d+)", word):
        return {"nbits_key": int(pair[1]), "nbits_value": int(pair[2])}
    names = ", ".join(map(str, (*PRESETS, *CHOICES["rotation"][1:], *CHOICES["backend"])))
    return _number_word(word, f"a number of bits, kXvY, gN, rN, sN, {names}, FIELD=VALUE")


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """All of them in one; what two of them have is refused."""
    merged: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if name in merged:
                raise ValueError(f"{name}: given twice; allowed: once")
            merged[name] = value
    return merged


def _hf_settings(words: list[str], fields: dict[str, Any]) -> dict[str, Any]:
    for name in fields:
        if name not in _HF_FIELDS:
            raise ValueError(f"{name}: unknown option; allowed: {', '.join(_HF_FIELDS)}")
        if type(fields[name]) is not int:
            raise ValueError(f"{name}: got {fields[name]!r}; allowed: a whole number")
    settings = _merged(*map(_hf_word, words))
    if "sink_length" in settings:
        raise ValueError("sink_length: transformers' QuantizedCache keeps no sinks")
    if "group_size" in settings:
        settings["q_group_size"] = settings.pop("group_size")
    return _merged(settings, fields)


def _hf_word(word: str) -> dict[str, Any]:
    if axes := re.fullmatch(r"a(-?\d)/(-?\d)", word):
        return {"axis_key": int(axes[1]), "axis_value": int(axes[2])}
    return _number_word(word, "a number of bits, gN, rN, aN/N, FIELD=VALUE")


def _number_word(word: str, allowed: str) -> dict[str, Any]:
    if word.isdecimal():
        return {"nbits": int(word)}
    if re.fullmatch(r"[grs]-?\d+", word):
        return {_WORD_FIELDS[word[0]]: int(word[1:])}
    raise ValueError(f"unknown option {word!r}; allowed: {allowed}")


@dataclass(frozen=True)
class CacheBits:
    """What a cache weighs as beside a 16-bit model, whatever the dtype of the model that filled it.

    Attributes:
        per_value: bits per cached value. Codes as stored; scales, minima and exact values in 16 bits each.
        per_packed_value: the same for the quantized values alone; `NOTHING_PACKED` where there are none.
    """

    per_value: float
    per_packed_value: float


def cache_bits(cache: Cache) -> CacheBits:
    """Measure the tensors that the cache holds. Room that is allocated for more tokens does not count."""
    packed_bits, packed_values, exact_values = (
        sum(part) for part in zip(*map(_layer_bits, cache.layers), strict=True)
    )
    values = packed_values + exact_values
    return CacheBits(
        (packed_bits + 16 * exact_values) / values if values else 0.0,
        packed_bits / packed_values if packed_values else NOTHING_PACKED,
    )


def _layer_bits(layer: Any) -> tuple[int, int, int]:
    """(bits of the quantized values, how many they are, how many values are exact)."""
    if hasattr(layer, "memory"):
        memory = layer.memory()
        return 8 * (memory.codes + memory.scales), memory.packed_values, memory.values - memory.packed_values
    quantized = [vars(layer)[name] for name in ("_quantized_keys", "_quantized_values") if name in vars(layer)]
    values = sum(layer._dequantize(states).numel() for states in quantized)
    return sum(_bits(tensor) for states in quantized for tensor in _tensors(states)), values, held_by(layer).values


def _tensors(held: Any) -> Iterator[Tensor]:
    """The plain tensors in nested containers and in tensor subclasses, such as quanto's."""
    if isinstance(held, Mapping):
        held = list(held.values())
    if isinstance(held, (list, tuple)):
        for part in held:
            yield from _tensors(part)
    elif hasattr(held, "__tensor_flatten__"):
        for name in held.__tensor_flatten__()[0]:
            yield from _tensors(getattr(held, name))
    elif isinstance(held, Tensor):
        yield held


def _bits(tensor: Tensor) -> int:
    width = 8 * tensor.element_size()
    return tensor.numel() * (min(width, 16) if torch.is_floating_point(tensor) else width)
