"""[`FixedKIVILayer`]: a layer of fixed capacity, whose decode step ``generate`` compiles and captures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kivicache.attention import layer_reasons
from kivicache.buffer import TokenBuffer
from kivicache.config import LayerConfig
from kivicache.fixed_attention import FixedPackedStates, append_step, places_of_heads
from kivicache.fixed_states import KEYS, MAX_STEP_LENGTH, REFUSED, SINKS, TOTAL, VALUES, FixedStates, static
from kivicache.layer import KIVILayer, check_pair, checked_crop, outside_of_graphs
from kivicache.memory import MemoryReport
from kivicache.policy import packed_lengths
from kivicache.states import KIVIStates

logger = logging.getLogger(__name__)

BACKENDS = ("native", "mse")  # those whose arithmetic a graph can hold: no library's, no look at a value


class FixedKIVILayer(KIVILayer):
    """A [`KIVILayer`] with room for ``max_cache_len`` tokens, allocated once.

    A step of up to ``MAX_STEP_LENGTH`` tokens runs on the device alone, compiled or not. Everything else, a prompt, a
    ``crop``, reading the content, is done by the growing cache's own [`KIVIStates`] on the same memory: it asks the
    device for the lengths, and works outside of a compiled graph.

    Attention sees ``max_cache_len`` tokens, those not there yet hidden by the mask, as with ``StaticLayer``; a prompt
    on an empty cache sees itself, unless ``pads_prompt``.
    """

    is_compileable = True
    pads_prompt = False  # where the mask is shared with layers of another kind, which show ``max_cache_len`` tokens
    _lengths: Tensor  # int32 on the device, see fixed_states.py
    _places: Tensor | None  # int32 on the device, see fixed_attention.py; None where all heads have the same bits

    def __init__(self, config: LayerConfig, max_cache_len: int, model_config: PreTrainedConfig | None = None):
        check_capacity(max_cache_len)
        for name, given, allowed in (("policy", config.policy, ("window",)), ("backend", config.backend, BACKENDS)):
            if given not in allowed:
                names = " or ".join(f'"{each}"' for each in allowed)
                raise ValueError(f'{name}: got "{given}"; allowed with max_cache_len: {names}')
        self.max_cache_len = max_cache_len
        self._model_config = model_config
        self._stores: tuple[FixedStates, FixedStates] | None = None
        # room is made for as many exact tokens as there may be, so for no more than can come
        sink_length = min(config.sink_length, max_cache_len)
        residual_length = min(config.residual_length, max_cache_len - sink_length)
        super().__init__(replace(config, sink_length=sink_length, residual_length=residual_length))
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A deep copy, in this process or another: its tensors are made ready for steps, see [`static`]."""
        self.__dict__.update(state)
        if self._stores is not None:
            self._lengths = static(self._lengths)
            self._places = None if self._places is None else static(self._places)

    def _forget(self) -> None:
        self._is_empty = True
        self._most = 0  # at least as many tokens as are cached

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As [`KIVILayer.update`], of the shape that [`get_mask_sizes`] promised.

        Raises:
            ValueError: where the tokens do not fit, in shape or in number; the cache is left as it was.
        """
        if not self._steps(key_states, value_states):
            return self._update_outside(key_states, value_states)
        if not torch.compiler.is_compiling():
            self._expect(key_states.shape[2])
        assert self._stores is not None
        keys, values = self._stores
        append_step(keys, values, self._lengths, key_states.detach(), value_states.detach(), self._kernels)
        first, self._is_empty = self._is_empty, False  # behind the step: where that fails, an empty layer stays empty
        if first and not self.pads_prompt:
            return key_states, value_states
        if self._dense_reasons:
            return keys.dense(self._lengths), values.dense(self._lengths)
        return FixedPackedStates.of(keys, self._lengths, self._places), FixedPackedStates.of(values, self._lengths)

    def _steps(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether these tokens are a step on buffers that are there, through which no gradient is to pass."""
        if not self.is_initialized:
            return False
        check_pair(key_states, value_states)
        if not 0 < key_states.shape[2] <= MAX_STEP_LENGTH:
            return False
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return False
        return self._fits(key_states, value_states)

    @outside_of_graphs("a prompt on KIVICache(max_cache_len=...) is cached outside of the compiled graph")
    def _update_outside(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        check_pair(key_states, value_states)
        new = key_states.shape[2]
        if self._is_empty:
            self._check_room(new, new)
        if not self.is_initialized or (self._is_empty and not self._fits(key_states, value_states)):
            self.lazy_initialization(key_states, value_states)
        with self._on_host() as (keys, values):
            self._check_room(len(keys) + new, new)
            self._checked(key_states, value_states)
            seen = key_states, value_states
            if len(keys):
                seen = keys.read(tail=key_states), values.read(tail=value_states)
            if len(keys) or self.pads_prompt:
                seen = self._padded(seen[0]), self._padded(seen[1])
            lengths = packed_lengths(self.config, len(keys) + new)
            keys.append(key_states, lengths[0])
            values.append(value_states, lengths[1])
        return seen

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate everything, for the batch, heads, widths, dtype and device of the first states."""
        stores = []
        for side, like in enumerate((key_states, value_states)):
            nbits = self._nbits_of_heads(side, like.shape[1])
            stores.append(FixedStates(like, nbits, (KEYS, VALUES)[side], self.config, self.max_cache_len))
        self._stores = stores[0], stores[1]
        self._lengths = static(torch.zeros(6, dtype=torch.int32, device=key_states.device))
        places = places_of_heads(stores[0].format.heads, stores[1].format.heads)
        self._places = None if places is None else static(places.to(key_states.device))
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        self._dense_reasons = layer_reasons(*(self._host_states(store, 0, 0, 0) for store in self._stores))
        # the step in torch operations otherwise; the attention is fused all the same
        keys, values = (store.format for store in self._stores)
        self._kernels = (
            not self._dense_reasons
            and keys.head_dim == values.head_dim
            and all(len(form.nbits) == 1 and form.nbits[0] < 16 for form in (keys, values))
        )
        self._forget()
        self.is_initialized = True
        if not self._dense_reasons and self._model_config is not None:
            _hint_attention(str(self._model_config._attn_implementation))

    @property
    def keys(self) -> Tensor | None:
        """All keys as one dense tensor, dequantized at each reading; None before the first update. Read-only."""
        return self._read(0)

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._refuse_assignment("keys", states)

    @property
    def values(self) -> Tensor | None:
        """All values as one dense tensor; None before the first update. Read-only."""
        return self._read(1)

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._refuse_assignment("values", states)

    def get_seq_length(self) -> Any:
        """How many tokens are cached: 0, or a tensor on the device, as of ``StaticLayer``, so that nobody waits."""
        return 0 if self._is_empty else self._lengths[TOTAL].long()

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens the next ``query_length`` ones will see, and from which on.

        ``generate`` asks before each step, also before a compiled one. So this is where it is refused in time.

        Raises:
            ValueError: where ``query_length`` more tokens do not fit.
        """
        if self._is_empty:
            self._check_room(query_length, query_length)
            if not self.pads_prompt:
                return query_length, 0
        elif not torch.compiler.is_compiling():
            self._expect(query_length)
        return self.max_cache_len, 0

    def crop(self, tokens_to_remove: int) -> None:
        tokens_to_remove = checked_crop(tokens_to_remove)
        if tokens_to_remove and self.is_initialized:
            with self._on_host():
                super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything; the buffers stay where they are, for the next call."""
        if self.is_initialized:
            self._lengths.zero_()
        self._forget()

    def offload(self) -> None:
        raise ValueError("offload: allowed for a growing cache only; KIVICache(max_cache_len=...) stays on its device")

    def memory(self) -> MemoryReport:
        """The bytes held, see [`MemoryReport`]; room for more tokens is slack."""
        if self._stores is None:
            return MemoryReport()
        with self._on_host():
            report = super().memory()
        used = report.total - report.slack
        return replace(report, slack=self.allocated_nbytes - used)

    @property
    def allocated_nbytes(self) -> int:
        """All bytes allocated; nothing changes them once the layer is initialized."""
        if self._stores is None:
            return 0
        tensors = [self._lengths, *(tensor for store in self._stores for tensor in store.tensors)]
        return sum(tensor.nbytes for tensor in tensors) + (0 if self._places is None else self._places.nbytes)

    def dense_reasons(self) -> list[str]:
        return ["nothing is cached yet"] if self._dense_reasons is None else self._dense_reasons

    def _map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        selected = [store.selected(select) for store in self._stores or ()]  # all of it before anything is replaced
        for store, tensors in zip(self._stores or (), selected, strict=True):
            store.replace(tensors)
        if self._stores is not None:
            self.batch_size = self._stores[0].residual.shape[0]

    def _read(self, side: int) -> Tensor | None:
        if self._is_empty:
            return None
        with self._on_host() as states:
            return states[side].read()

    def _refuse_assignment(self, name: str, states: Tensor | None) -> None:
        if states is not None or self._stores is not None:
            raise ValueError(
                f"{name}: a KIVICache(max_cache_len=...) cannot be assigned; allowed: update, crop, reset"
            )

    @contextmanager
    def _on_host(self) -> Iterator[tuple[KIVIStates, KIVIStates]]:
        """The content as [`KIVIStates`] on the same memory, with what is due packed; what becomes of them is kept.

        The residual is a copy until then, and the rest is only ever added to behind what is there: so an error in
        between leaves the layer as it was.
        """
        assert self._stores is not None
        lengths = [0] * 6 if self._is_empty else self._read_lengths()
        states = [
            self._host_states(store, lengths[SINKS], lengths[store.format.length], lengths[TOTAL])
            for store in self._stores
        ]
        due = packed_lengths(self.config, lengths[TOTAL])
        states = [side.packing(packed_length) for side, packed_length in zip(states, due, strict=True)]
        self._keys, self._values = states
        try:
            yield states[0], states[1]
            keys, values = self._keys, self._values
        finally:
            self._keys = self._values = None
        self._keep(keys, values)

    def _keep(self, keys: KIVIStates, values: KIVIStates) -> None:
        assert self._stores is not None
        for store, states in zip(self._stores, (keys, values), strict=True):
            newest = states.residual.read()
            store.residual[:, :, : newest.shape[2]] = newest
        total = len(keys)
        lengths = [len(keys.sinks), keys.packed_length, values.packed_length, total, 0, 0]
        self._lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        self._is_empty, self._most = total == 0, total

    def _host_states(self, store: FixedStates, sinks: int, packed: int, total: int) -> KIVIStates:
        form = store.format
        states = KIVIStates(store.residual[:, :, :0], form.nbits_of_heads, form.axis, self.config)
        states.sinks = TokenBuffer.of(store.sinks, sinks)
        states.residual.append(store.residual[:, :, : total - sinks - packed])
        groups = packed // form.tokens_per_group
        for i, (heads, tokens) in enumerate(states.packed):
            codes, scale, minimum = store.packed[i]
            if isinstance(tokens, TokenBuffer):
                states.packed[i] = heads, TokenBuffer.of(codes, packed)
            else:
                tokens.codes = TokenBuffer.of(codes, packed)
                tokens.scale, tokens.minimum = TokenBuffer.of(scale, groups), TokenBuffer.of(minimum, groups)
        return states

    def _fits(self, key_states: Tensor, value_states: Tensor) -> bool:
        assert self._stores is not None
        return all(
            (states.shape[0], states.shape[1], states.shape[3]) == (*store.residual.shape[:2], store.residual.shape[3])
            and (states.dtype, states.device) == (store.residual.dtype, store.residual.device)
            for store, states in zip(self._stores, (key_states, value_states), strict=True)
        )

    def _padded(self, states: Tensor) -> Tensor:
        return torch.nn.functional.pad(states, (0, 0, 0, self.max_cache_len - states.shape[2]))

    def _expect(self, new: int) -> None:
        """Refuse ``new`` more tokens where they do not fit.

        The host does not see what a compiled step does. It counts what it was asked for, perhaps more than once a
        token, and asks the device only where that would be too much.
        """
        self._most += new
        if self._most > self.max_cache_len:
            cached = self._read_lengths()[TOTAL]
            self._most = cached
            self._check_room(cached + new, new)
            self._most = cached + new

    def _read_lengths(self) -> list[int]:
        lengths: list[int] = self._lengths.tolist()
        if lengths[REFUSED]:
            raise ValueError(
                f"max_cache_len: got {self.max_cache_len}, and {lengths[REFUSED]} compiled steps on a full cache, "
                "whose tokens are not cached; allowed: as many tokens as fit"
            )
        return lengths

    def _check_room(self, total: int, new: int) -> None:
        if total > self.max_cache_len:
            raise ValueError(
                f"max_cache_len: got {self.max_cache_len}, and {new} new tokens after {total - new} cached ones; "
                "allowed: at least the tokens of the prompt, all new ones, and those of a draft on top"
            )


def check_capacity(max_cache_len: Any) -> None:
    if type(max_cache_len) is not int or max_cache_len < 1:
        raise ValueError(f"max_cache_len: got {max_cache_len!r}; allowed: a positive whole number of tokens")


@cache
def _hint_attention(name: str) -> None:
    if name != "kivi":
        logger.warning(
            'A compiled decode step reads packed bytes with the attention "kivi" only; with %r each layer is '
            'dequantized first. For speed: model.set_attn_implementation("kivi")',
            name,
        )
