"""[`KIVILayer`]: one attention layer of the cache. The file to read first."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kivicache.attention import MAX_QUERY_LENGTH, PackedStates, layer_reasons, store_tokens
from kivicache.config import LayerConfig
from kivicache.memory import MemoryReport
from kivicache.policy import packed_lengths
from kivicache.states import KIVIStates

_Function = TypeVar("_Function", bound=Callable[..., Any])


def outside_of_graphs(reason: str) -> Callable[[_Function], _Function]:
    """Let a compiled model break its graph at this function; where it may not, the error says the reason."""
    return torch.compiler.disable(reason=reason)


# sizes change from step to step, also those of buffers
GROWS = "KIVICache grows outside of a compiled graph; one graph takes KIVICache(max_cache_len=...)"


class KIVILayer(DynamicLayer):
    """A full-attention layer whose older tokens are packed.

    It stands in for ``transformers.cache_utils.DynamicLayer``: same calls, same shapes, and ``keys`` and ``values``
    read and assign the whole dense tensors ``[batch, kv_heads, tokens, head_dim]``.
    """

    def __init__(self, config: LayerConfig):
        self.config = config
        self._keys: KIVIStates | None = None
        self._values: KIVIStates | None = None
        self._dense_reasons: list[str] | None = None
        super().__init__()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Cache new tokens and return what the attention sees.

        A prompt on an empty cache attends to its own exact keys and values. Later tokens attend to the cache as it
        was before this call, followed by their own exact keys and values: a few of them, where the kernels can serve,
        to [`PackedStates`], else to dense tensors. Then the tokens that have left the window are packed.

        Args:
            key_states, value_states: ``[batch, kv_heads, new_tokens, head_dim]``; head_dim may differ between them.

        Returns:
            keys, values: ``[batch, kv_heads, tokens, head_dim]``, all tokens.

        Raises:
            ValueError: where the new states do not fit the cached ones; the cache is left as it was.
        """
        if torch.compiler.is_compiling():
            return self._update_outside(key_states, value_states)
        return self._update(key_states, value_states, may_attend_packed=True)

    @outside_of_graphs(GROWS)
    def _update_outside(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        return self._update(key_states, value_states, may_attend_packed=False)  # a graph cannot hold PackedStates

    def _update(self, key_states: Tensor, value_states: Tensor, may_attend_packed: bool) -> tuple[Tensor, Tensor]:
        check_pair(key_states, value_states)
        if self._holds_nothing():
            self.lazy_initialization(key_states, value_states)
        cached_keys, cached_values = self._checked(key_states, value_states)
        packed = packed_lengths(self.config, len(cached_keys) + key_states.shape[2])
        if may_attend_packed and self._attends_packed(key_states, value_states):
            new_keys, new_values = cached_keys.with_own_residual(), cached_values.with_own_residual()
            # where something is packed, the sinks are complete
            store_tokens(new_keys.residual, new_values.residual, key_states, value_states)
            keys: Tensor = PackedStates(new_keys)
            values: Tensor = PackedStates(new_values)
            new_keys, new_values = new_keys.packing(packed[0]), new_values.packing(packed[1])
        else:
            keys, values = key_states, value_states
            if len(cached_keys) > 0:
                keys, values = cached_keys.read(tail=key_states), cached_values.read(tail=value_states)
            new_keys, new_values = cached_keys.snapshot(), cached_values.snapshot()
            new_keys.append(key_states, packed[0])
            new_values.append(value_states, packed[1])
        # at once and at the end: out of memory before, say, or Ctrl-C, loses no token
        self._keys, self._values = new_keys, new_values
        return keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Prepare empty stores with the batch, heads, widths, dtype and device of the first states."""
        self._keys, self._values = self._empty(0, key_states), self._empty(1, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self._dense_reasons, self.is_initialized = None, True

    @property
    def keys(self) -> Tensor | None:
        """All keys as one dense tensor, dequantized at each reading; None before the first update.

        Assigning takes a tensor as the layer's new content. A tensor that only shortens what is there, such as
        ``layer.keys[:, :, :n]``, crops: the codes that remain are not touched.
        """
        return None if self._keys is None else self._keys.read()

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._keys = self._assigned(0, self._keys, states)

    @property
    def values(self) -> Tensor | None:
        """All values as one dense tensor; reads and assigns as ``keys`` does."""
        return None if self._values is None else self._values.read()

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._values = self._assigned(1, self._values, states)

    def get_seq_length(self) -> int:
        """How many tokens are cached."""
        return 0 if self._keys is None else len(self._keys)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens; 0 changes nothing.

        Raises:
            ValueError: for a positive number, which transformers 5.20 no longer allows, or one that is not whole.
        """
        removed = -checked_crop(tokens_to_remove)
        if removed:
            self._change(lambda states: states.crop(max(len(states) - removed, 0)))

    def reset(self) -> None:
        """Forget everything: the layer is as new."""
        self._keys = self._values = self._dense_reasons = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let sequence ``i`` of the batch continue from sequence ``beam_idx[i]``."""
        self._map_batch(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch ``repeats`` times."""
        self._map_batch(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` of the batch."""
        self._map_batch(lambda states: states[indices, ...])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._change(lambda states: states.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        self._change(lambda states: states.to(self.device, non_blocking=True))

    def dense_reasons(self) -> list[str]:
        """Why new tokens attend to this layer's dense tensors instead of its packed bytes; empty where they do not."""
        if self._keys is None or self._values is None:
            return ["nothing is cached yet"]
        if self._dense_reasons is None:
            self._dense_reasons = layer_reasons(self._keys, self._values)
        return self._dense_reasons

    def memory(self) -> MemoryReport:
        """The bytes held, see [`MemoryReport`]."""
        return sum((states.memory() for states in self._states()), MemoryReport())

    def pretend(self, key: Tensor, value: Tensor, length: int) -> None:
        """Hold the memory of a prompt of ``length - 1`` tokens and one step, on the meta device.

        Args:
            key, value: of one token, ``[batch, kv_heads, 1, head_dim]``.
        """
        self.lazy_initialization(key, value)
        before, after = (packed_lengths(self.config, tokens) for tokens in (length - 1, length))
        for states, token, prompt_length, packed_length in zip(
            self._states(), (key, value), before, after, strict=True
        ):
            states.pretend(length - 1, prompt_length)
            states.append(token, packed_length)

    def __getattr__(self, name: str) -> Any:
        # Some models call methods of their own kind of layer, which a cache without their config did not make.
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}: if the model looks for it, its layers are not "
            "plain attention, and the cache must know them: pass KIVICache(..., config=model.config)"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config}, {self.get_seq_length()} tokens)"

    def _empty(self, side: int, like: Tensor) -> KIVIStates:
        """Empty stores for the keys (``side`` 0) or the values (1), shaped like the states ``like``."""
        axis = (self.config.axis_key, self.config.axis_value)[side]
        return KIVIStates(like, self._nbits_of_heads(side, like.shape[1]), axis, self.config)

    def _nbits_of_heads(self, side: int, kv_heads: int) -> list[int]:
        """The bits of the keys (``side`` 0) or of the values (1) of each kv head."""
        config = self.config
        if any(head >= kv_heads for head in config.heads):
            raise ValueError(
                f"heads: got kv head {max(config.heads)}; allowed: 0 to {kv_heads - 1}, the layer's kv heads"
            )
        nbits = (config.nbits_key, config.nbits_value)[side]
        return [config.heads[head][side] if head in config.heads else nbits for head in range(kv_heads)]

    def _assigned(self, side: int, cached: KIVIStates | None, states: Tensor | None) -> KIVIStates | None:
        """The stores after the dense tensor ``states`` was assigned to ``keys`` (``side`` 0) or ``values`` (1)."""
        if states is None:
            return None
        _check_dimensions(("keys", "values")[side], states)
        length = states.shape[2]
        if cached is not None and length <= len(cached) and _same(states, cached.read()[:, :, :length]):
            kept = cached.snapshot()
            kept.crop(length)
            return kept
        self._dense_reasons = None
        fresh = self._empty(side, states)
        fresh.append(states, packed_lengths(self.config, length)[side])
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = states.dtype, states.device, True
        return fresh

    def _attends_packed(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether these new tokens are to meet the cached ones as [`PackedStates`]."""
        return (
            not self.dense_reasons()
            and 0 < key_states.shape[2] <= MAX_QUERY_LENGTH
            and all(states.packed_length > 0 for states in self._states())
            and not (torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad))
        )

    def _checked(self, key_states: Tensor, value_states: Tensor) -> tuple[KIVIStates, KIVIStates]:
        """Both stores, once the new states are known to fit them and each other."""
        if self._keys is None or self._values is None or len(self._keys) != len(self._values):
            keys, values = (0 if states is None else len(states) for states in (self._keys, self._values))
            raise ValueError(f"keys hold {keys} tokens, values {values}: assign both before the next update")
        for name, states, cached in (
            ("key_states", key_states, self._keys),
            ("value_states", value_states, self._values),
        ):
            batch, kv_heads, _, head_dim = cached.residual.data.shape
            if (states.shape[0], states.shape[1], states.shape[3]) != (batch, kv_heads, head_dim):
                raise ValueError(
                    f"{name}: got shape {list(states.shape)}; allowed: [{batch}, {kv_heads}, new_tokens, {head_dim}], "
                    "as cached"
                )
            for given, allowed in (
                (states.dtype, cached.residual.data.dtype),
                (states.device, cached.residual.data.device),
            ):
                if given != allowed:
                    raise ValueError(f"{name}: got {given}; allowed: {allowed}, as cached")
        return self._keys, self._values

    def _holds_nothing(self) -> bool:
        return not any(len(states) for states in self._states())

    def _map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        self._change(lambda states: states.map_batch(select))

    def _change(self, change: Callable[[KIVIStates], None]) -> None:
        """Change keys and values, both or none; what an update returned earlier stays as it was until the next one."""
        changed = [None if states is None else states.snapshot() for states in (self._keys, self._values)]
        for states in changed:
            if states is not None:
                change(states)
        self._keys, self._values = changed

    def _states(self) -> Iterator[KIVIStates]:
        return (states for states in (self._keys, self._values) if states is not None)


def checked_crop(tokens_to_remove: Any) -> int:
    """The number itself, where it is a whole one up to 0: transformers 5.17 gives a tensor, on the model's device."""
    try:
        number = operator.index(tokens_to_remove)
    except TypeError:
        number = 1
    if number > 0:
        raise ValueError(
            f"tokens_to_remove: got {tokens_to_remove!r}; allowed: 0, or a negative number of tokens to remove"
        )
    return number


def check_pair(key_states: Tensor, value_states: Tensor) -> None:
    _check_dimensions("key_states", key_states)
    _check_dimensions("value_states", value_states)
    for dim, what in ((0, "sequences"), (2, "tokens")):
        keys, values = key_states.shape[dim], value_states.shape[dim]
        if keys != values:
            raise ValueError(f"value_states: got {values} {what}; allowed: {keys}, as in key_states")


def _same(states: Tensor, others: Tensor) -> bool:
    """Whether two tensors are equal; a NaN equals a NaN."""
    alike = (states.shape, states.dtype, states.device) == (others.shape, others.dtype, others.device)
    return alike and bool(((states == others) | (states.isnan() & others.isnan())).all())


def _check_dimensions(name: str, states: Tensor) -> None:
    if not isinstance(states, Tensor):
        raise ValueError(f"{name}: got {type(states).__name__}; allowed: a tensor")
    if states.dim() != 4 or not states.is_floating_point():
        raise ValueError(
            f"{name}: got {states.dtype} of shape {list(states.shape)}; allowed: a floating tensor "
            "[batch, kv_heads, tokens, head_dim]"
        )
