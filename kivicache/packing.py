"""Codes of 2, 4 or 8 bits in 16-bit words, packed along head_dim.

The bit picture, for head_dim 32 at 4 bits (16 // 4 = 4 codes a word, so 32 / 4 = 8 words a token):

    word w of a token:   bits 15..12   bits 11..8   bits 7..4   bits 3..0
    holds channel:          w + 24        w + 16       w + 8         w

Field j of word w belongs to channel ``j * words + w``. So field j of all the words of a token is a run of
neighbouring channels, and unpacking needs no re-interleaving: a kernel turns field j of a [tokens, words] tile into
the [tokens, words] tile of channels ``j * words ...``, two 16-bit lanes at a time.

A token's codes are one row of their own: tokens can be added, cut off and selected one by one without touching the
bytes of any other token, for keys and values alike. Where head_dim does not fill the last words, the spare fields
are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 16


def words_per_token(head_dim: int, nbits: int) -> int:
    """How many 16-bit words hold ``head_dim`` codes of ``nbits`` bits."""
    return -(-head_dim * nbits // WORD_BITS)


def pack(codes: Tensor, nbits: int) -> Tensor:
    """Pack codes into words.

    Args:
        codes: uint8 ``[..., head_dim]``, each below ``2**nbits``.
        nbits: 2, 4 or 8.

    Returns:
        int16 ``[..., words_per_token(head_dim, nbits)]``.
    """
    words = words_per_token(codes.shape[-1], nbits)
    packed = torch.zeros(*codes.shape[:-1], words, dtype=torch.int32, device=codes.device)
    for j, field in enumerate(codes.split(words, dim=-1)):
        packed[..., : field.shape[-1]] |= field.to(torch.int32) << (j * nbits)
    return packed.to(torch.int16)


def unpack(words: Tensor, nbits: int, head_dim: int) -> Tensor:
    """The exact inverse of [`pack`].

    Args:
        words: int16 ``[..., words_per_token(head_dim, nbits)]``.
        nbits: 2, 4 or 8.
        head_dim: how many codes a token has.

    Returns:
        uint8 ``[..., head_dim]``.
    """
    mask = (1 << nbits) - 1
    fields = [(words >> shift).bitwise_and_(mask).to(torch.uint8) for shift in range(0, WORD_BITS, nbits)]
    return torch.cat(fields, dim=-1)[..., :head_dim]
