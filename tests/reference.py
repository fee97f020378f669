"""KIVI written out plainly, to hold the library against. Slow, dense, and sharing no code with the library."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def quantize_group(values, nbits):
    """The paper's arithmetic for one flat group of values: (codes, scale, minimum), metadata rounded to 16 bits."""
    minimum = values.min().half().float()
    scale = ((values.max() - values.min()) / (2**nbits - 1)).half().float()
    if scale == 0:
        return torch.zeros_like(values), scale, minimum
    return torch.clamp(torch.round((values - minimum) / scale), 0, 2**nbits - 1), scale, minimum


def fake_quantize(states, nbits, group_size, axis):
    """What ``states`` [batch, heads, tokens, head_dim] read back as: all loops over the groups written out."""
    if nbits == 16:
        return states
    dtype, states, result = states.dtype, states.float(), torch.empty_like(states, dtype=torch.float32)
    tokens, head_dim = states.shape[2:]
    group_size = head_dim if group_size == -1 else group_size
    dim, length = (2, tokens) if axis == "channel" else (3, head_dim)
    for start in range(0, length, group_size):
        width = min(group_size, length - start)
        group = states.narrow(dim, start, width)
        low, high = group.amin(dim, keepdim=True), group.amax(dim, keepdim=True)
        minimum, scale = low.half().float(), ((high - low) / (2**nbits - 1)).half().float()
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes = torch.clamp(torch.round((group - minimum) / safe), 0, 2**nbits - 1)
        result.narrow(dim, start, width).copy_(codes * scale + minimum)
    return result.to(dtype)


def rotate(states):
    """The orthonormal Hadamard matrix of the largest power of two that divides head_dim, block by block."""
    head_dim = states.shape[-1]
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while head_dim % (2 * len(matrix)) == 0:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    matrix = matrix / len(matrix) ** 0.5
    return (states.double().unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


class WindowRule:
    """sinks | packed | window: one split; a block leaves the window when residual_length newer tokens remain."""

    def __init__(self, residual_length, block):
        self.residual_length, self.block = residual_length, block

    def packed_after(self, length, packed):
        boundary = 0
        while length - boundary - self.block >= self.residual_length:
            boundary += self.block
        return max(boundary, packed)


class PaperKeysRule:
    """Algorithm 1 for keys: l mod R stay exact in the prefill; in decode R are packed as soon as there are R."""

    def __init__(self, residual_length):
        self.residual_length = residual_length

    def packed_after(self, length, packed):
        boundary = 0
        while boundary + self.residual_length <= length:
            boundary += self.residual_length
        return max(boundary, packed)


class PaperValuesRule:
    """Algorithm 1 for values: the newest R stay exact, every older one is packed."""

    def __init__(self, residual_length):
        self.residual_length = residual_length

    def packed_after(self, length, packed):
        while length - packed > self.residual_length:
            packed += 1
        return packed


class ReferenceSide:
    """The keys or the values of a layer as one dense tensor, in which packed tokens are fake-quantized in place."""

    def __init__(self, rule, sink_length, nbits, group_size, axis):
        self.rule, self.sink_length, self.nbits, self.group_size, self.axis = (
            rule,
            sink_length,
            nbits,
            group_size,
            axis,
        )
        self.states, self.packed = None, 0

    def append(self, states):
        self.states = states if self.states is None else torch.cat([self.states, states], dim=2)
        packed = max(self.rule.packed_after(self.states.shape[2] - self.sink_length, self.packed), self.packed)
        old = slice(self.sink_length + self.packed, self.sink_length + packed)
        if packed > self.packed:
            self.states = self.states.clone()
            for head in range(states.shape[1]):
                nbits = self.nbits if isinstance(self.nbits, int) else self.nbits[head]
                head = slice(head, head + 1)
                self.states[:, head, old] = fake_quantize(self.states[:, head, old], nbits, self.group_size, self.axis)
        self.packed = packed

    def crop(self, length):
        self.states = self.states[:, :, :length]
        kept = min(self.packed, max(length - self.sink_length, 0))
        self.packed = kept - kept % self.group_size if self.axis == "channel" else kept


class ReferenceLayer(DynamicLayer):
    """A layer that does with dense tensors what KIVILayer is to do with packed ones."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.reset()

    def reset(self):
        c = self.config
        heads = max(c.heads, default=-1) + 1
        bits = [[c.heads.get(h, (c.nbits_key, c.nbits_value))[s] for h in range(heads)] for s in (0, 1)]
        bits = bits if heads else [c.nbits_key, c.nbits_value]
        if c.policy == "paper":
            rules = PaperKeysRule(c.residual_length), PaperValuesRule(c.residual_length)
        else:
            block = c.group_size if c.group_size > 0 else 32
            rules = (WindowRule(c.residual_length, block),) * 2
        self.sides = [
            ReferenceSide(rules[0], c.sink_length, bits[0], c.group_size, c.axis_key),
            ReferenceSide(rules[1], c.sink_length, bits[1], c.group_size, c.axis_value),
        ]
        self.is_initialized = False

    def lazy_initialization(self, key_states, value_states):
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = []
        for side, states in zip(self.sides, (key_states, value_states), strict=True):
            empty = side.states is None or side.states.shape[2] == 0
            seen.append(states if empty else torch.cat([side.states, states], dim=2))
            side.append(states)
        return tuple(seen)

    @property
    def keys(self):
        return self.sides[0].states if hasattr(self, "sides") else None

    @keys.setter
    def keys(self, states):
        if states is not None:
            self.sides[0].states = states

    @property
    def values(self):
        return self.sides[1].states if hasattr(self, "sides") else None

    @values.setter
    def values(self, states):
        if states is not None:
            self.sides[1].states = states

    def get_seq_length(self):
        return 0 if self.sides[0].states is None else self.sides[0].states.shape[2]

    def crop(self, tokens_to_remove):
        if tokens_to_remove and self.sides[0].states is not None:
            for side in self.sides:
                side.crop(max(side.states.shape[2] + tokens_to_remove, 0))


def reference_cache(kivi_config, layers):
    """A DynamicCache of ``layers`` ReferenceLayers, for models whose layers are all full attention."""
    cache = DynamicCache()
    cache.layers = [ReferenceLayer(kivi_config.layer(idx)) for idx in range(layers)]
    cache.layer_class_to_replicate = None
    return cache
