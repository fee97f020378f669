"""What to quantize and how: [`KIVIConfig`] for a model, resolved to one [`LayerConfig`] per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from kivicache.files import replacing

CHOICES: dict[str, tuple[Any, ...]] = {
    "nbits": (2, 4, 8, 16),
    "nbits_key": (2, 4, 8, 16),
    "nbits_value": (2, 4, 8, 16),
    "axis_key": ("channel", "token"),
    "axis_value": ("channel", "token"),
    "rotation": (None, "hadamard"),
    "policy": ("window", "paper"),
    "backend": ("native", "mse", "hqq", "quanto"),
}
# bits of a packed value -> the best setting found that holds for all layers, see KIVIConfig.preset
PRESETS: dict[str, dict[str, Any]] = {
    "2.5bit": {"nbits_key": 2, "nbits_value": 2, "group_size": 64, "rotation": "hadamard"},
    "3bit": {"nbits_key": 2, "nbits_value": 2, "group_size": 32, "rotation": "hadamard"},
    "3.5bit": {"nbits_key": 4, "nbits_value": 2, "group_size": 64, "rotation": "hadamard"},
    "4bit": {"nbits_key": 4, "nbits_value": 2, "group_size": 32, "rotation": "hadamard"},
    "5bit": {"nbits_key": 4, "nbits_value": 4, "group_size": 32, "rotation": "hadamard"},
}
# KIVI to the letter, but for its bits
PAPER: dict[str, Any] = {"group_size": 32, "residual_length": 128, "sink_length": 0, "policy": "paper"}
HEAD_FIELDS = ("nbits", "nbits_key", "nbits_value")
_MERGE = "tag:yaml.org,2002:merge"
_KVTUNER_AXES = {0: "token", 1: "channel"}
_DEFAULT_NBITS_KEY, _DEFAULT_NBITS_VALUE = 4, 2


@dataclass(frozen=True, kw_only=True)
class _Settings:
    group_size: int = 32
    axis_key: str = "channel"
    axis_value: str = "token"
    residual_length: int = 128
    sink_length: int = 32
    rotation: str | None = None
    policy: str = "window"
    backend: str = "native"

    def _check(self) -> None:
        for name in (f.name for f in fields(_Settings)):
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        if self.group_size == -1:  # one group per token, so no group can run along the tokens
            object.__setattr__(self, "axis_key", "token")
            object.__setattr__(self, "axis_value", "token")
        if self.policy == "paper":
            self._check_paper_policy()

    def _check_paper_policy(self) -> None:
        if self.axis_value == "channel":
            raise ValueError(
                'axis_value: got "channel"; allowed: "token", as policy "paper" quantizes values one token at a time'
            )
        group = self.group_size if self.axis_key == "channel" else 1
        if self.residual_length < 1 or self.residual_length % group:
            raise ValueError(
                f"residual_length: got {self.residual_length}; allowed: positive multiples of {group}, the key group, "
                'as policy "paper" quantizes that many keys at once'
            )


@dataclass(frozen=True, kw_only=True)
class LayerConfig(_Settings):
    """One layer's settings: the fields of [`KIVIConfig`] with its overrides for that layer applied.

    ``heads`` maps a kv head's index to its own ``(nbits_key, nbits_value)``; other heads use the layer's.
    """

    nbits_key: int = _DEFAULT_NBITS_KEY
    nbits_value: int = _DEFAULT_NBITS_VALUE
    heads: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check()

    @property
    def block_length(self) -> int:
        """How many tokens the "window" policy quantizes at a time: one group, or 32 where groups lie in a token."""
        return 32 if self.group_size == -1 else self.group_size

    def __str__(self) -> str:
        group = "token" if self.group_size == -1 else self.group_size
        heads = f", {len(self.heads)} heads apart" if self.heads else ""
        rotation = f", {self.rotation}" if self.rotation else ""
        policy = f", {self.policy}" if self.policy != "window" else ""
        return f"K{self.nbits_key}V{self.nbits_value} g{group}{rotation}{policy}{heads}"


@dataclass(frozen=True, kw_only=True)
class KIVIConfig(_Settings):
    """Settings of a [`KIVICache`].

    The defaults follow KIVI (arXiv 2402.02750) with two changes: the first ``sink_length`` tokens stay in full
    precision (attention sinks; Kitty, arXiv 2511.18643, measures what that gains), and keys and values are split at
    one and the same token. [`KIVIConfig.paper`] is the paper to the letter.

    Args:
        nbits: for the constructor alone: sets both of the next two; only one of the two ways may be used.
        nbits_key, nbits_value: 2, 4, 8, or 16 (kept in full precision, bit-identical to ``DynamicCache``).
            Default 4 and 2: keys need more bits than values (KVTuner, arXiv 2502.04420).
        group_size: values that share a scale and a minimum: tokens where the axis is "channel", channels where it
            is "token". -1: one group per token (KVTuner's per-token mode); both axes then read "token".
        axis_key, axis_value: what a group runs along: "channel" (one channel over tokens) or "token" (one token over
            channels). KVTuner's 1 and 0 are read as these words.
        residual_length: at least this many of the newest tokens stay in full precision.
        sink_length: this many of the first tokens stay in full precision. Positions count, padding included.
        rotation: "hadamard" rotates keys and values along head_dim before they are quantized, and back when read.
            None: as they are.
        policy: "window": one split point for keys and values, moved on in blocks of ``group_size`` tokens, never
            fewer than ``residual_length`` exact tokens. "paper": KIVI's Algorithm 1, where keys are quantized
            ``residual_length`` at a time and values one by one.
        backend: who chooses codes, scale and minimum: "native" (min-max), "mse" (least squared error, slower to
            pack), "hqq" or "quanto".
        layers: layer index -> any of the fields above, for that layer alone.
        heads: layer index -> kv head index -> bits, as one number or as {nbits_key, nbits_value}.

    Raises:
        ValueError: naming the field, what was given and what is allowed.
    """

    nbits: InitVar[int | None] = None
    nbits_key: int | None = None
    nbits_value: int | None = None
    layers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    heads: Mapping[int, Mapping[int, Mapping[str, int]]] = field(default_factory=dict)

    def __post_init__(self, nbits: int | None) -> None:
        given = {k: v for k, v in (("nbits", nbits), *self._bits().items()) if v is not None}
        bits = {"nbits_key": _DEFAULT_NBITS_KEY, "nbits_value": _DEFAULT_NBITS_VALUE} | _checked_fields(given)
        for name, value in bits.items():
            object.__setattr__(self, name, value)
        self._check()
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        object.__setattr__(self, "heads", _checked_heads(self.heads))
        for layer_idx in {*self.layers, *self.heads}:
            try:
                self.layer(layer_idx)
            except ValueError as error:
                raise ValueError(f"layers[{layer_idx}].{error}") from None

    def _bits(self) -> dict[str, int | None]:
        return {"nbits_key": self.nbits_key, "nbits_value": self.nbits_value}

    def layer(self, layer_idx: int) -> LayerConfig:
        """The settings of layer ``layer_idx``, its overrides applied."""
        settings = {f.name: getattr(self, f.name) for f in fields(_Settings)} | self._bits()
        settings |= self.layers.get(layer_idx, {})
        heads = {
            head: (bits.get("nbits_key", settings["nbits_key"]), bits.get("nbits_value", settings["nbits_value"]))
            for head, bits in self.heads.get(layer_idx, {}).items()
        }
        return LayerConfig(**settings, heads=heads)

    @property
    def backends(self) -> set[str]:
        """Every backend that some layer uses."""
        return {self.backend, *(settings["backend"] for settings in self.layers.values() if "backend" in settings)}

    @classmethod
    def paper(cls, nbits: int) -> KIVIConfig:
        """KIVI to the letter: groups of 32, a residual of 128, no sinks, Algorithm 1's two split points."""
        return cls(nbits=_checked("nbits", nbits), **PAPER)

    @classmethod
    def preset(cls, name: str) -> KIVIConfig:
        """The best setting for all layers alike, of those measured, at so many true bits per packed value.

        The least KL to full precision of SmolLM2-135M-Instruct on one text, confirmed on another: bits of keys and
        values, groups, with and without rotation. On both texts every preset has 0.37 to 0.70 of the KL of the same
        bits without rotation; "2.5bit" and "3.5bit" are better than those at half a bit more. The tables are
        benchmarks/results/presets.csv and presets_confirmed.csv, from ``python -m benchmarks.presets``.

        All presets rotate, which helped that model, but tripled the KL of a Gemma 3 model: measure yours
        with ``kivicache eval --cache kivi:4bit kivi:4bit:rotation=null``, or let ``kivicache tune`` decide layer by
        layer. All have the faster kernel, but for groups of 64 ("2.5bit", "3.5bit") where head_dim is 64.

        Args:
            name: "2.5bit", "3bit", "3.5bit", "4bit" or "5bit".

        Raises:
            ValueError: for another name.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"preset: got {name!r}; allowed: {', '.join(map(repr, PRESETS))}")
        return cls(**PRESETS[name])

    @classmethod
    def from_dict(cls, settings: Mapping[Any, Any]) -> KIVIConfig:
        """Build from a mapping of this class's fields, or from a KVTuner preset.

        A KVTuner preset maps layer index -> {nbits_key, nbits_value}, or layer index -> kv head index -> the same.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"expected a mapping of settings, got {settings!r}")
        if settings and all(_is_index(key) for key in settings):
            return cls._from_kvtuner(settings)
        allowed = ["nbits", *(f.name for f in fields(cls))]
        for key in settings:
            if key not in allowed:
                raise ValueError(f"{key}: unknown setting; allowed: {', '.join(allowed)}")
        return cls(**settings)

    @classmethod
    def _from_kvtuner(cls, preset: Mapping[Any, Any]) -> KIVIConfig:
        per_head = {
            layer_idx: bits
            for layer_idx, bits in preset.items()
            if isinstance(bits, Mapping) and bits and all(_is_index(key) for key in bits)
        }
        return cls(layers={k: v for k, v in preset.items() if k not in per_head}, heads=per_head)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python values; ``from_dict`` gives the same config back."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["layers"] = {layer_idx: dict(settings) for layer_idx, settings in self.layers.items()}
        plain["heads"] = {
            layer_idx: {head: dict(bits) for head, bits in heads.items()} for layer_idx, heads in self.heads.items()
        }
        return plain

    @classmethod
    def from_yaml(cls, path: str | Path) -> KIVIConfig:
        """Read a file written by [`to_yaml`], by hand, or by KVTuner (see [`from_dict`])."""
        try:
            return cls.from_dict(yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader))
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The config as YAML text, also written to ``path`` where one is given."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        if path is not None:
            with replacing(path) as file:
                file.write_text(text, encoding="utf-8")
        return text


class _Loader(yaml.SafeLoader):
    """``yaml.safe_load``'s loader, but a key that is given twice is an error: the last one would silently win."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # as written: merge keys (<<) are not followed yet
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key}: given twice; allowed: once")
        return node


def _is_index(key: Any) -> bool:
    return (isinstance(key, int) and not isinstance(key, bool)) or (isinstance(key, str) and key.isdecimal())


def _indexed(name: str, mapping: Any) -> dict[int, Any]:
    """``mapping`` with its indices as whole numbers, which text such as "0" may stand for."""
    indexed: dict[int, Any] = {}
    for key, value in _mapping(name, mapping).items():
        if not _is_index(key) or int(key) < 0:
            raise ValueError(f"{name}: got index {key!r}; allowed: whole numbers from 0")
        if int(key) in indexed:
            raise ValueError(f"{name}: got index {key!r} twice; allowed: once")
        indexed[int(key)] = value
    return indexed


def _checked(name: str, value: Any) -> Any:
    """``value`` as the field ``name`` keeps it, or a ValueError that says what is allowed."""
    if name.startswith("axis_") and type(value) is int:
        value = _KVTUNER_AXES.get(value, value)
    if name == "rotation" and str(value).lower() == "none":  # a word that YAML does not know
        value = None
    if name in CHOICES:
        allowed = CHOICES[name]
        if type(value) not in {type(choice) for choice in allowed} or value not in allowed:
            raise ValueError(f"{name}: got {value!r}; allowed: {', '.join(map(repr, allowed))}")
    elif name == "group_size":
        if type(value) is not int or (value < 1 and value != -1):
            raise ValueError(f"{name}: got {value!r}; allowed: a positive whole number, or -1 for one group per token")
    elif type(value) is not int or value < 0:  # residual_length, sink_length
        raise ValueError(f"{name}: got {value!r}; allowed: a whole number of tokens, 0 or more")
    return value


def _checked_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check every value, and replace ``nbits`` by the two fields that it stands for."""
    checked = {name: _checked(name, value) for name, value in settings.items()}
    nbits = checked.pop("nbits", None)
    if nbits is not None:
        for name in ("nbits_key", "nbits_value"):
            if checked.setdefault(name, nbits) != nbits:
                raise ValueError(
                    f"nbits: got {nbits} beside {name}={checked[name]}; allowed: either nbits, which sets keys and "
                    "values alike, or nbits_key and nbits_value"
                )
    return checked


def _checked_layers(layers: Any) -> dict[int, dict[str, Any]]:
    allowed = ["nbits", "nbits_key", "nbits_value", *(f.name for f in fields(_Settings))]
    return {
        layer_idx: _checked_mapping(f"layers[{layer_idx}]", settings, allowed)
        for layer_idx, settings in _indexed("layers", layers).items()
    }


def _checked_heads(heads: Any) -> dict[int, dict[int, dict[str, int]]]:
    checked: dict[int, dict[int, dict[str, int]]] = {}
    for layer_idx, per_head in _indexed("heads", heads).items():
        checked[layer_idx] = {}
        for head, bits in _indexed(f"heads[{layer_idx}]", per_head).items():
            bits = bits if isinstance(bits, Mapping) else {"nbits": bits}
            checked[layer_idx][head] = _checked_mapping(f"heads[{layer_idx}][{head}]", bits, HEAD_FIELDS)
    return checked


def _checked_mapping(name: str, settings: Any, allowed: list[str] | tuple[str, ...]) -> dict[str, Any]:
    for key in _mapping(name, settings):
        if key not in allowed:
            raise ValueError(f"{name}.{key}: unknown setting; allowed: {', '.join(allowed)}")
    try:
        return _checked_fields(settings)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None


def _mapping(name: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: got {value!r}; allowed: a mapping")
    return value
