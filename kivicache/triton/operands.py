"""What the decode kernels take: the tensors of a layer and of a call. Nothing here needs triton."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kivicache.buffer import TokenBuffer


class Store(NamedTuple):
    """Packed tokens of some heads.

    words int16 ``[batch, heads, tokens, words]``; scale, minimum float16, one per group. With nbits 16, words are the
    tokens themselves, and scale and minimum are not read.
    """

    words: TokenBuffer
    scale: TokenBuffer
    minimum: TokenBuffer
    nbits: int
    group_size: int


class Tokens(NamedTuple):
    """Keys or values of a layer but for the packed ones: the first tokens and the newest, in full precision."""

    sinks: TokenBuffer
    newest: TokenBuffer
    axis: str

    @property
    def head_dim(self) -> int:
        return int(self.newest.data.shape[3])


class Pair(NamedTuple):
    """Heads whose keys have the same bits, and whose values have.

    heads: int32 ``[3, heads]`` on the device: the kv head, and where it lies in either store; None: all, in order.
    """

    keys: Store
    values: Store
    heads: Tensor | None = None


class Call(NamedTuple):
    """What the kernels are launched with."""

    query: Tensor  # [batch, query heads, query tokens, head_dim], contiguous
    query_rotated: Tensor  # for packed keys: the same where they are not rotated
    keys: Tokens
    values: Tokens
    rotated: bool  # whether the packed values are
    mask: Tensor | None
    mask_kind: int  # 0: none, 1: bool, 2: additive
    mask_strides: tuple[int, ...]
    scale: float  # of the scores in base 2
    softcap: float
    lengths: Tensor | None
    n_sink: int
    n_key: int
    n_value: int
    n_total: int

    @property
    def kv_heads(self) -> int:
        return int(self.keys.newest.data.shape[1])

    @property
    def rows(self) -> int:
        """Query rows of one kv head."""
        return int(self.query.shape[1] // self.kv_heads * self.query.shape[2])

    def buffers(self, pair: Pair) -> tuple[TokenBuffer, ...]:
        """The tensors of ``pair`` and of the layer, in the kernels' order."""
        (k_words, k_scale, k_minimum, *_), (v_words, v_scale, v_minimum, *_) = pair.keys, pair.values
        full = self.keys.sinks, self.values.sinks, self.keys.newest, self.values.newest
        return k_words, v_words, k_scale, k_minimum, v_scale, v_minimum, *full

    def strides(self, pair: Pair) -> tuple[int, ...]:
        """Of the batch and of the head, in the order of ``buffers``, once where scale and minimum share them."""
        k_words, v_words, k_scale, _, v_scale, _, *full = (buffer.strides for buffer in self.buffers(pair))
        return (*k_words, *v_words, *k_scale, *v_scale, *(stride for strides in full for stride in strides))
