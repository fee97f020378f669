"""Block sizes, warps and numbers of splits, and why. Measured on an H200."""

from __future__ import annotations

import functools
from typing import Any

import torch

# Tokens in a tile of decode_nvidia: two parts of 32, which share one dot with the minimum. 128 needed twice the shared
# memory and lost a quarter of the speed.
BLOCK_T = 64
# Tiles in flight in a program, the one being worked on included. 3 and 4 were slower: fewer programs fit.
STAGES = 2
# Query rows of a program: one n8 tile of the tensor cores serves 8 rows, two serve 16.
MAX_ROWS = 16
# Registers of a thread of decode_nvidia with 8 rows: 12 programs of one warp fill a multiprocessor's 65536. Asked for
# rather than hoped for: compilers that take a few more leave room for 10, and a grid meant for 12 runs in two rounds.
REGISTERS = 168
# Warps of a program of the portable kernel. Its tiles are small and all its reductions run along a row: one warp
# needs no barrier and no trip through shared memory, and does not repeat the addresses four times over.
PORTABLE_WARPS_NVIDIA = 1
PORTABLE_WARPS = 4
# Values of a warp of pack_channel_kernel, 128 a thread, and of pack_token_kernel and unpack_kernel, 64 a thread. What
# decided, in microseconds for 8 heads of 32768 tokens, head_dim 128, bfloat16, groups of 32; a copy of as many bytes
# takes 24, 26 and 30 at 2, 4 and 8 bits:
#   packing by channel: 128 values a thread in vectors of 2 words 42, 41, 39; of 4 words 50, 44, 43; 64 values a thread
#       61, 52, 40; two warps to a tile 48, 42, 37
#   packing by token: 64 values a thread 40, 36, 36; 128 values 40, 38, 63 (at 8 bits the registers run out)
#   unpacking by channel: 64 values a thread 28, 27, 31; 128 values 31, 30, 33; by token 29, 28, 31 and 30, 28, 31
PACK_CHANNEL_VALUES = 4096
TOKEN_VALUES = 2048


@functools.lru_cache
def _device(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def max_registers(rows: int, head_dim: int) -> int | None:
    """The registers that a thread of decode_nvidia may take; None leaves it to the compiler."""
    return REGISTERS if rows <= 8 and head_dim <= 128 else None


@functools.lru_cache
def resident_programs(nbits: tuple[int, int], head_dim: int, group_size: int, rows: int, device: torch.device) -> int:
    """How many programs of decode_nvidia run at once on the device: by registers and by shared memory."""
    properties = _device(device.index if device.index is not None else torch.cuda.current_device())
    words = sum(head_dim * n // 16 for n in nbits)
    columns, groups = head_dim // group_size, max(BLOCK_T // group_size, 1)
    tile = BLOCK_T * words * 2 + groups * head_dim * 4 + BLOCK_T * (columns + (8 if columns < 8 else 16)) * 2
    shared = max(STAGES * tile, 32 * head_dim * 2) + 1024
    by_shared = properties.shared_memory_per_multiprocessor // shared
    by_registers = 65536 // 32 // (max_registers(rows, head_dim) or 255)
    return int(properties.multi_processor_count * min(by_shared, by_registers))


@functools.lru_cache(maxsize=4096)
def splits(tiles: int, heads: int, slots: int) -> int:
    """Programs per key head, so that all programs run at once and end together.

    A program costs its tiles and about six tiles' time on top (query, first loads, epilogue); a second or third round
    of programs is taken only when it fills the machine better.
    """
    best = None
    for rounds in (1, 2, 3):
        n = rounds * slots // heads
        if n < 1:
            continue
        share = -(-tiles // min(n, tiles))
        cost = rounds * (share + 6)
        if best is None or cost < best[0]:
            best = cost, -(-tiles // share)
    return best[1] if best else 1


def fast_splits(
    nbits: tuple[int, int],
    head_dim: int,
    group_size: int,
    packed: int,
    full: int,
    heads: int,
    rows: int,
    device: torch.device,
) -> int:
    """Programs per key head for decode_nvidia, given its tokens, packed and in full precision."""
    block = max(8, 1 << (min(rows, MAX_ROWS) - 1).bit_length())
    tiles = -(-packed // BLOCK_T) + 2 * (-(-full // 32) + 1)
    return splits(tiles, heads * -(-rows // block), resident_programs(nbits, head_dim, group_size, block, device))


def portable_splits(tokens: int, heads: int, rows: int, device: torch.device) -> int:
    """Programs per key head for the portable kernel: as many as run at once, at least 64 tokens each."""
    count = _device(device.index or 0).multi_processor_count if device.type == "cuda" else 2
    slots = count * (8 if portable_warps(device) == 1 else 4)
    return max(1, min(-(-tokens // 64), slots // (heads * -(-rows // 64))))


def portable_block(group_sizes: tuple[int, int], axes: tuple[str, str]) -> int:
    """Tokens of a tile of the portable kernel: one group of the channel axis, so that a tile needs one row of scales.

    16 tokens are what a dot needs, and more than 32 cost more registers than they save instructions.
    """
    along_tokens = [size for size, axis in zip(group_sizes, axes, strict=True) if axis == "channel"]
    return 16 if any(size % 32 for size in along_tokens) else 32


def portable_warps(device: torch.device) -> int:
    """Warps of a program of the portable kernel."""
    return PORTABLE_WARPS_NVIDIA if device.type == "cuda" and not torch.version.hip else PORTABLE_WARPS


def pack_channel_tile(nbits: int, words: int, group_size: int) -> dict[str, int]:
    """Blocks of pack_channel_kernel. A warp takes 32 tokens, which is 128 values a thread.

    Vectors of two words, not the widest: the fewer lanes share a word's column, the fewer tokens lie in other lanes,
    and the range of a group is found in registers.
    """
    block_g = _power_of_two(group_size)
    warps = min(max(block_g // 32, 1), 8)
    block_w = max(min(_power_of_two(words), PACK_CHANNEL_VALUES * warps * nbits // 16 // block_g), 1)
    return {"BLOCK_G": block_g, "BLOCK_W": block_w, "VECTOR": min(2, block_w), "num_warps": warps}


def pack_token_tile(nbits: int, words: int, group_size: int) -> dict[str, int]:
    """Blocks of pack_token_kernel: as many tokens as make TOKEN_VALUES values."""
    block_w, block_g = _power_of_two(words), _power_of_two(group_size)
    block_t = max(TOKEN_VALUES // max(block_w * 16 // nbits, block_g), 1)
    return {"BLOCK_T": block_t, "BLOCK_W": block_w, "BLOCK_G": block_g, "num_warps": 1}


def unpack_tile(nbits: int, words: int, tokens_per_group: int | None) -> dict[str, int]:
    """Blocks of unpack_kernel: as many tokens as make TOKEN_VALUES values.

    Where groups are of tokens, all tokens of a tile are of one group, so that one row of scales serves them.
    """
    block_w = _power_of_two(words)
    block_t = max(TOKEN_VALUES // (block_w * 16 // nbits), 1)
    if tokens_per_group is not None:
        block_t = min(block_t, tokens_per_group & -tokens_per_group)
    return {"BLOCK_T": block_t, "BLOCK_W": block_w, "num_warps": 1}


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
