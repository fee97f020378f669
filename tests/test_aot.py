"""Every kernel compiles ahead of time for GPUs that are not there: NVIDIA sm_80 and sm_90, AMD gfx942.

Each test is a process of its own: whether kernels are compiled or interpreted is settled when they are defined.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
NBITS = [(2, 2), (8, 8)]
DTYPES = {
    "word": "*i16",
    "scale": "*fp16",
    "min": "*fp16",
    "len": "*i32",
    "head": "*i32",
    "lse": "*fp32",
    "o": "*fp32",
    "rotated": "*fp32",
}


def compile_kernel(kernel, target, pointers, constants, num_warps, gluon=False):
    """Build ``kernel`` for ``target``; pointers and sizes that are multiples of 16 are said to be, as in a launch."""
    import triton
    from triton.backends.compiler import GPUTarget

    if gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source
    names, unknown = kernel.arg_names, set(constants) - set(kernel.arg_names)
    assert not unknown, f"{kernel.__name__} has no {unknown}"
    types = {
        name: "constexpr"
        if name in constants
        else pointers.get(name) or ("fp32" if name in ("scale", "cap") else "i32")
        for name in names
    }
    numbers = [name for name in names if types[name] == "i32" and (gluon or name.startswith("stride"))]
    aligned = [
        i for i, name in enumerate(names) if types[name][0] == "*" or (name in numbers and not name.startswith("n_"))
    ]
    source = Source(
        kernel,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": num_warps})
    binary = compiled.asm["hsaco" if target.startswith("gfx") else "cubin"]
    assert len(binary) > 1000
    print(f"{kernel.__module__}.{kernel.__name__} {target} {constants}: {len(binary)} bytes")
    return compiled


def pointer_types(kernel, states):
    """A type for every pointer by the last word of its name; ``states`` is that of queries, keys and values."""
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    return {name: DTYPES.get(name.split("_")[-2], states) for name in pointers}


def words(head_dim, nbits):
    return head_dim if nbits == 16 else -(-head_dim * nbits // 16)


def compile_decode(
    target, head_dim, nbits, mask=0, softcap=False, states="*bf16", rows=4, group_size=32, axes=("channel", "token"),
    mixed=False, rotated=False,
):  # fmt: skip
    import triton.language as tl
    from triton import next_power_of_2

    from kivicache.triton import tuning
    from kivicache.triton.decode_portable import decode_kernel

    k_words, v_words = (words(head_dim, n) for n in nbits)
    constants = {
        "ROWS": rows,
        "Q": 1,
        "DK": head_dim,
        "DV": head_dim,
        "G_K": group_size,
        "G_V": group_size,
        "K_NBITS": nbits[0],
        "V_NBITS": nbits[1],
        "K_CHANNEL": axes[0] == "channel",
        "V_CHANNEL": axes[1] == "channel",
        "MASK": mask,
        "SOFTCAP": softcap,
        "LENGTHS_ON_DEVICE": False,
        "MIXED": mixed,
        "ROTATED": rotated,
        "BLOCK_N": 16,
        "BLOCK_T": tuning.portable_block((group_size, group_size), axes),
        "BLOCK_DK": max(16, next_power_of_2(head_dim)),
        "BLOCK_KW": max(16, next_power_of_2(k_words)),
        "BLOCK_VW": max(16, next_power_of_2(v_words)),
        "DOT_TYPE": tl.float32 if states == "*fp32" else tl.float16,
        "PTX": target.startswith("sm") and states != "*fp32",
    }
    pointers = pointer_types(decode_kernel, states) | {"mask_ptr": "*i8" if mask < 2 else states}
    pointers |= {f"{side}_word_ptr": states for side, n in zip("kv", nbits, strict=True) if n == 16}
    warps = tuning.PORTABLE_WARPS if target.startswith("gfx") else tuning.PORTABLE_WARPS_NVIDIA
    return compile_kernel(decode_kernel, target, pointers, constants, warps)


def compile_fast(target, head_dim, nbits, mask=0, softcap=False, rows=4, mixed=False, rotated=False, group_size=32):
    from kivicache.triton import decode_nvidia, tuning

    kernel = decode_nvidia.decode_kernel
    constants = {
        "H": 8,
        "HEADS": 8,
        "ROWS": rows,
        "Q": 1,
        "N": 8 if rows <= 8 else 16,
        "D": head_dim,
        "G": group_size,
        "BK": nbits[0],
        "BV": nbits[1],
        "WK": words(head_dim, nbits[0]),
        "WV": words(head_dim, nbits[1]),
        "BT": tuning.BLOCK_T,
        "STAGES": tuning.STAGES,
        "MASK": mask,
        "SOFTCAP": softcap,
        "DEVLEN": False,
        "MIXED": mixed,
        "ROTATED": rotated,
    }
    pointers = pointer_types(kernel, "*bf16") | {"mask_ptr": "*i8" if mask < 2 else "*bf16"}
    pointers |= {"kw": "*i16", "vw": "*i16"} | dict.fromkeys(("ks", "km", "vs", "vm"), "*fp16")
    pointers |= dict.fromkeys(("kst", "vst", "kr", "vr"), "*bf16")
    return compile_kernel(kernel, target, pointers, constants, num_warps=1, gluon=True)


def compile_pack(target, head_dim, nbits):
    from kivicache.triton import tuning
    from kivicache.triton.pack import pack_channel_kernel, pack_token_kernel
    from kivicache.triton.unpack import unpack_kernel

    width = words(head_dim, nbits)
    shape = {"NBITS": nbits, "W": width, "D": head_dim, "G": 32}
    for kernel, extra, tile in (
        (pack_channel_kernel, {}, tuning.pack_channel_tile(nbits, width, 32)),
        (pack_token_kernel, {}, tuning.pack_token_tile(nbits, width, 32)),
        (unpack_kernel, {"AXIS_CHANNEL": True}, tuning.unpack_tile(nbits, width, 32)),
        (unpack_kernel, {"AXIS_CHANNEL": False}, tuning.unpack_tile(nbits, width, None)),
    ):
        warps = tile.pop("num_warps")
        compile_kernel(kernel, target, pointer_types(kernel, "*bf16"), shape | extra | tile, warps)


def compile_append(target, head_dim, nbits, query_length=1, rotation_block=0, least_squares=()):
    from triton import next_power_of_2

    from kivicache.triton.append import append_kernel

    k_words, v_words = (words(head_dim, n) for n in nbits)
    constants = {
        "Q": query_length,
        "S": 32,
        "RESIDUAL": 128,
        "BLOCK": 32,
        "FLUSH": 32,
        "SINK_ROWS": 48,
        "RES_ROWS": 192,
        "D": head_dim,
        "G": 32,
        "K_NBITS": nbits[0],
        "V_NBITS": nbits[1],
        "K_W": k_words,
        "V_W": v_words,
        "K_CHANNEL": True,
        "V_CHANNEL": False,
        "ROTATION_BLOCK": rotation_block,
        "LEAST_SQUARES": least_squares,
        "BLOCK_G": 32,
        "BLOCK_KW": next_power_of_2(k_words),
        "BLOCK_VW": next_power_of_2(v_words),
        "BLOCK_D": next_power_of_2(head_dim),
        "BLOCK_Q": next_power_of_2(query_length),
    }
    compile_kernel(append_kernel, target, pointer_types(append_kernel, "*bf16"), constants, num_warps=4)


def compile_combine(target):
    from kivicache.triton.combine import combine_kernel
    from kivicache.triton.rotate import rotate_kernel

    shape = {"ROWS": 4, "D": 80, "BLOCK_D": 128, "ROTATION_BLOCK": 16}
    pointers = pointer_types(combine_kernel, "*bf16")
    compile_kernel(combine_kernel, target, pointers, shape | {"BLOCK_S": 32, "AUX": True}, num_warps=4)
    shape.pop("ROWS")
    compile_kernel(rotate_kernel, target, pointer_types(rotate_kernel, "*bf16"), shape | {"BLOCK_R": 4}, num_warps=1)


PORTABLE = {
    "decode": ["compile_decode({target!r}, 128, (4, 2))"],
    "decode of other formats": [
        "compile_decode({target!r}, 80, (2, 16), mask=1, mixed=True, rotated=True)",
        'compile_decode({target!r}, 128, (8, 8), group_size=128, axes=("token", "token"), states="*fp32")',
    ],
    "append": [
        "compile_append({target!r}, 128, (4, 2), rotation_block=128)",
        "compile_append({target!r}, 80, (8, 8), query_length=5)",
        "compile_append({target!r}, 80, (4, 2), rotation_block=16, least_squares=(3, 0.15, 4))",
    ],
    "pack and combine": [
        "compile_pack({target!r}, 128, 8)",
        "compile_pack({target!r}, 80, 4)",
        "compile_combine({target!r})",
    ],
}
FAST = {
    "fast decode": [f"compile_fast({{target!r}}, 128, {nbits})" for nbits in NBITS],
    "fast decode of other shapes": [
        "compile_fast({target!r}, 64, (4, 4), mask=1, rows=16)",
        "compile_fast({target!r}, 128, (2, 2), mask=2, softcap=True)",
        "compile_fast({target!r}, 128, (4, 2), mixed=True, rotated=True)",
        "compile_fast({target!r}, 64, (2, 2))",
        "compile_fast({target!r}, 256, (4, 2), group_size=128)",
    ],
}


@pytest.mark.parametrize(
    ("target", "calls"),
    [
        pytest.param(target, calls, id=f"{target} {name}")
        for target in TARGETS
        for name, calls in (PORTABLE if target == "gfx942" else PORTABLE | FAST).items()
    ],
)
def test_compiles(target, calls, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = "\n".join(["from tests.test_aot import *", *(call.format(target=target) for call in calls)])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
