"""Attention of a few query tokens over packed and full-precision tokens: split over the sequence, then merged.

On an NVIDIA GPU decode_nvidia.py serves the common formats; decode_portable.py serves all. Both write the same partial
outputs, which combine.py merges, so heads of different bits may be shared out between them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from kivicache.triton import decode_portable, tuning
from kivicache.triton.combine import combine_splits
from kivicache.triton.operands import Call, Pair, Tokens
from kivicache.triton.rotate import rotate

LOG2E = 1.4426950408889634
_NO_MASK = (0, 0, 0, 0)


def decode_attention(
    query: Tensor,
    keys: Tokens,
    values: Tokens,
    pairs: Sequence[Pair],
    *,
    rotated: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    lengths: Tensor | None = None,
    fast: bool | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention over sinks, packed tokens and the newest tokens.

    Args:
        query: ``[batch, query heads, query tokens, head_dim]``.
        keys, values: of the query's dtype.
        pairs: the packed tokens that lie between the sinks and the newest ones; every kv head in one of them.
        rotated: whether the packed tokens of fewer than 16 bits are, see [`kivicache.rotation`]. Values then are
            either all of 16 bits or none.
        mask: None, bool (True: attend) or additive; ``[batch, 1 or query heads, 1 or query tokens, tokens]``. More
            than one query token needs it for causality.
        scale: of the scores, default ``head_dim ** -0.5``.
        softcap: 0 is off.
        s_aux: ``[query heads]``, one more score in every softmax, with no value (the sinks of gpt-oss).
        lengths: int32 on the device, that begins with how many sinks, packed keys, packed values and tokens are valid.
            The buffers then say what room there is, and a captured graph goes on working as the lengths grow.
        fast: decode_nvidia.py (True) or decode_portable.py (False); default: the former where it serves.
        splits: programs per key head, default from tuning.py.

    Returns:
        ``[batch, query heads, query tokens, value's head_dim]``, the query's dtype. A row that sees nothing is 0.

    Raises:
        ValueError: where the fast kernel is asked for and cannot serve, with the reasons.
    """
    query = query.contiguous()
    n_sink, n_key, n_value = len(keys.sinks), len(pairs[0].keys.words), len(pairs[0].values.words)
    n_total = n_sink + n_key + len(keys.newest)
    if lengths is None and n_total != n_sink + n_value + len(values.newest):
        raise ValueError(f"keys hold {n_total} tokens, values {n_sink + n_value + len(values.newest)}")
    mask_kind, mask_strides = 0, _NO_MASK
    if mask is not None:
        mask_kind = 1 if mask.dtype == torch.bool else 2
        mask = mask.view(torch.uint8) if mask_kind == 1 else mask
        sizes, steps = mask.shape, mask.stride()
        mask_strides = tuple(0 if size == 1 else step for size, step in zip(sizes, steps, strict=True))
    call = Call(
        query,
        rotate(query) if rotated else query,
        keys,
        values,
        rotated and pairs[0].values.nbits < 16,
        mask,
        mask_kind,
        mask_strides,
        (query.shape[3] ** -0.5 if scale is None else scale) * LOG2E,
        softcap,
        lengths,
        n_sink,
        n_key,
        n_value,
        n_total,
    )
    fast_pairs = [_is_fast(call, pair, fast) for pair in pairs]
    n_splits, n_exact = _splits(call, pairs, all(fast_pairs), splits)
    heads, width = query.shape[0] * call.kv_heads, values.head_dim
    # partial outputs [heads, splits, rows, width], and behind them their log-sum-exp [heads, splits, rows]
    partials = torch.empty(heads * n_splits * call.rows * (width + 1), dtype=torch.float32, device=query.device)
    for pair, is_fast in zip(pairs, fast_pairs, strict=True):
        if is_fast:
            from kivicache.triton import decode_nvidia  # Gluon is for NVIDIA alone

            decode_nvidia.launch(call, pair, partials, n_splits, n_exact)
        else:
            decode_portable.launch(call, pair, partials, n_splits, n_exact)
    return combine_splits(partials, query, call.kv_heads, width, n_splits, n_exact if call.rotated else None, s_aux)


def _is_fast(call: Call, pair: Pair, fast: bool | None) -> bool:
    """Whether decode_nvidia.py serves this pair; where it is asked for and does not, a ValueError says why."""
    if fast is False:
        return False
    (*buffers, key_nbits, key_group), (*more, value_nbits, value_group) = pair.keys, pair.values
    reasons = format_reasons(
        call.query.device,
        call.query.dtype,
        (call.keys.head_dim, call.values.head_dim),
        (key_nbits, value_nbits),
        (key_group, value_group),
        (call.keys.axis, call.values.axis),
    )
    if not reasons:
        full = (call.keys.sinks, call.values.sinks, call.keys.newest, call.values.newest)
        if call.scale <= 0:
            reasons = (f"scale {call.scale} is not positive",)
        elif call.query.data_ptr() % 16 or not all(buffer.aligned for buffer in (*buffers, *more, *full)):
            reasons = ("a tensor is not contiguous and aligned to 16 bytes",)
    if fast and reasons:
        raise ValueError("decode_nvidia cannot serve this: " + "; ".join(reasons))
    return not reasons


@functools.lru_cache
def format_reasons(
    device: torch.device,
    dtype: torch.dtype,
    head_dims: tuple[int, int],
    nbits: tuple[int, int],
    group_sizes: tuple[int, int],
    axes: tuple[str, str],
) -> tuple[str, ...]:
    """Why decode_nvidia.py cannot serve keys and values of this kind: empty if it can."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return ("needs an NVIDIA GPU of compute capability 8.0 or later",)
    reasons = []
    if dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {dtype} is neither float16 nor bfloat16")
    if head_dims[0] != head_dims[1] or head_dims[0] not in (64, 128, 256):
        reasons.append(f"head_dim {head_dims} is none of 64, 128, 256 for both")
    if axes != ("channel", "token"):
        reasons.append(f"axes {axes} are not (channel, token)")
    if group_sizes[0] != group_sizes[1] or group_sizes[0] not in (32, 64, 128) or group_sizes[1] > head_dims[1] // 2:
        reasons.append(f"group_size {group_sizes} is not 32, 64 or 128 for both, and at most half of the head")
    if not set(nbits) <= {2, 4, 8}:
        reasons.append(f"nbits {nbits} are not 2, 4 or 8 for both")
    return tuple(reasons)


def _splits(call: Call, pairs: Sequence[Pair], fast: bool, splits: int | None) -> tuple[int, int]:
    """Programs per key head, and how many of them are for tokens in full precision alone (0: not kept apart)."""
    device = call.query.device
    heads = -(-call.query.shape[0] * call.kv_heads // len(pairs))
    n_both = min(call.n_key, call.n_value)
    if splits is None and fast:
        splits = tuning.fast_splits(
            (pairs[0].keys.nbits, pairs[0].values.nbits),
            call.keys.head_dim,
            pairs[0].keys.group_size,
            n_both,
            call.n_total - n_both,
            heads,
            call.rows,
            device,
        )
    elif splits is None:
        splits = tuning.portable_splits(call.n_total, heads, call.rows, device)
    if not call.rotated:
        return splits, 0
    splits = max(splits, 2)
    return splits, max(1, min(splits // 4, (call.n_total - n_both) // 64))
