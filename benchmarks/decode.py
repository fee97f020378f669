"""Decode attention over packed bytes against the best 16-bit attention of PyTorch, on one GPU in one run.

    python -m benchmarks.decode [--only attention|formats|pack|host|first-call]

For every case: first the error against float32 attention over the dequantized values, then medians of CUDA-graph
replays with a cold L2 cache, the exact tokens (sinks and residual) included. The baseline is the faster of cuDNN and
flash attention in bfloat16 over as many tokens. Then quantizing and packing a prompt, and unpacking it, against
copying as many bytes; the host's time per layer and step; and the seconds that a fresh process compiles.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.decode_host import first_call_row, host_cases, host_row
from benchmarks.decode_plot import plot
from benchmarks.harness import Table, attempt
from kivicache import KIVIConfig, __version__
from kivicache.attention import PackedStates, fused_attention
from kivicache.layer import KIVILayer
from kivicache.packing import pack, unpack
from kivicache.quantization import dequantize, quantize

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda"
HEADS = 32
LIMIT = 90  # seconds of a case
MAX_ERROR = 8e-3  # bfloat16's rounding of the result alone is 1.6e-3


Rows = list[tuple[dict[str, str], Callable[[], dict[str, str]]]]  # what a row is of, and how to measure it


class Case(NamedTuple):
    name: str
    config: KIVIConfig
    batch: int
    tokens: int
    kv_heads: int = 8
    head_dim: int = 128


K2V2, K4V2, K4V4, K8V8 = KIVIConfig(nbits=2), KIVIConfig(), KIVIConfig(nbits=4), KIVIConfig(nbits=8)
ATTENTION = [
    Case("K2V2", K2V2, 8, 32768),
    Case("K2V2", K2V2, 1, 131072),
    Case("K2V2", K2V2, 8, 16384, kv_heads=32),
    Case("K4V4", K4V4, 8, 32768),
    Case("K4V2", K4V2, 8, 32768),
    Case("K8V8", K8V8, 8, 32768),
    Case("K2V2", K2V2, 32, 4096),
    Case("K4V2", K4V2, 8, 4096),
    Case("K4V2", K4V2, 1, 32768),
    Case("K4V2", K4V2, 1, 8192),
    Case("K2V2", K2V2, 1, 4096),
    Case("K4V2", K4V2, 1, 4096),
    Case("K4V4", K4V4, 1, 4096),
    Case("K8V8", K8V8, 1, 4096),
    Case("K4V2", K4V2, 1, 1024),
]
HALF = {head: {"nbits_key": 2, "nbits_value": 2} for head in range(4)}
FORMATS = [
    case
    for batch, tokens in ((8, 16384), (1, 32768))
    for case in (
        Case("K2V2 rotated", KIVIConfig(nbits=2, rotation="hadamard"), batch, tokens),
        Case("K2V2 groups of 64", KIVIConfig(nbits=2, group_size=64), batch, tokens),
        Case("K2V2 groups of 128", KIVIConfig(nbits=2, group_size=128), batch, tokens),
        Case("K4V4 per token", KIVIConfig(nbits=4, group_size=-1, axis_key="token"), batch, tokens),
        Case("K4V4, half the heads K2V2", KIVIConfig(nbits=4, heads={0: HALF}), batch, tokens),
        Case("K16V2", KIVIConfig(nbits_key=16, nbits_value=2), batch, tokens),
        Case("K2V2 head_dim 64", K2V2, batch, tokens, head_dim=64),
        Case("K4V2 head_dim 64", K4V2, batch, tokens, head_dim=64),
        Case("K4V4 head_dim 96", K4V4, batch, tokens, head_dim=96),
        Case("K2V2 head_dim 256", K2V2, batch, tokens, head_dim=256),
    )
]
PACK = [(nbits, axis) for axis in ("channel", "token") for nbits in (2, 4, 8)]


def microseconds(run: Callable[[], object]) -> tuple[float, float, float]:
    """Median, and the 20th and 80th percentile, of replays of ``run`` in a CUDA graph, the L2 cache emptied before."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    # else the first runs overtake what made their inputs, and write over memory that it still uses
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        low, median, high = do_bench(graph.replay, warmup=20, rep=80, quantiles=[0.2, 0.5, 0.8])
    return 1000 * median, 1000 * low, 1000 * high


def packed_layer(case: Case) -> list[PackedStates]:
    """Keys and values of random tokens as a decode step meets them."""
    layer = KIVILayer(case.config.layer(0))
    shape = (case.batch, case.kv_heads, case.tokens, case.head_dim)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    layer.update(keys[:, :, :-1], values[:, :, :-1])
    packed = [x for x in layer.update(keys[:, :, -1:], values[:, :, -1:]) if isinstance(x, PackedStates)]
    if len(packed) < 2:
        raise AssertionError("the fused attention does not serve this layer")
    return packed


def baseline(query: Tensor, keys: Tensor, values: Tensor) -> tuple[str, float]:
    """The faster of PyTorch's 16-bit attention kernels and its median in microseconds."""
    times, grouped = {}, keys.shape[1] != query.shape[1]
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                run = partial(scaled_dot_product_attention, query, keys, values, enable_gqa=grouped)
                times[name] = microseconds(run)[0]
        except RuntimeError as error:  # one of the two that does not know a format is no result
            print(f"{name} does not serve {list(keys.shape)}: {str(error).splitlines()[0]}", flush=True)
    best = min(times, key=times.__getitem__)
    return best, times[best]


def relative_error(query: Tensor, dense: list[Tensor], output: Tensor) -> float:
    """Of ``output`` against float32 attention, one sequence at a time: float32 copies of all would not fit."""
    batch, kv_heads, _, head_dim = dense[0].shape
    grouped = query.float().view(batch, kv_heads, -1, head_dim)
    expected = torch.cat(
        [
            (grouped[i] @ dense[0][i].float().mT * head_dim**-0.5).softmax(-1) @ dense[1][i].float()
            for i in range(batch)
        ]
    ).view_as(output)
    return ((output.float() - expected).norm() / expected.norm()).item()


def attention_row(case: Case) -> dict[str, str]:
    keys, values = packed_layer(case)
    query = torch.randn(case.batch, HEADS, 1, case.head_dim, dtype=torch.bfloat16, device=DEVICE)
    dense = [states.dense() for states in (keys, values)]
    error = relative_error(query, dense, fused_attention(query, keys, values))
    if not error < MAX_ERROR:
        raise AssertionError(f"relative error {error:.1e}")
    median, low, high = microseconds(partial(fused_attention, query, keys, values))
    name, base = baseline(query, *dense)
    held = sum(states.kivi_states.memory().total - states.kivi_states.memory().slack for states in (keys, values))
    return {
        "baseline": name,
        "baseline_us": f"{base:.1f}",
        "kivicache_us": f"{median:.1f}",
        "p20_us": f"{low:.1f}",
        "p80_us": f"{high:.1f}",
        "speedup": f"{base / median:.2f}",
        "byte_ceiling": f"{2 * dense[0].nbytes / held:.2f}",
        "tb_per_s": f"{held / median / 1e6:.2f}",
        "relative_error": f"{error:.1e}",
    }


def pack_row(nbits: int, axis: str, tokens: int = 32768) -> dict[str, str]:
    """Pack a prompt of 8 heads, and unpack it again; the ceiling is a copy that reads and writes as many bytes."""
    from kivicache.triton.pack import quantize_pack
    from kivicache.triton.unpack import unpack_dequantize

    states = torch.randn(1, 8, tokens, 128, dtype=torch.bfloat16, device=DEVICE)
    packed = quantize_pack(states, nbits, 32, axis)
    restored = torch.empty_like(states)
    unpack_dequantize(*packed, nbits, 32, axis, restored)
    codes, scale, minimum = quantize(states, nbits, 32, axis)
    for name, own, expected in zip(
        ("words", "scale", "minimum"), packed, (pack(codes, nbits), scale, minimum), strict=True
    ):
        if not torch.equal(own, expected):
            raise AssertionError(f"{name} differ from torch's")
    if not torch.equal(restored, dequantize(unpack(packed[0], nbits, 128), scale, minimum, 32, axis).to(states.dtype)):
        raise AssertionError("unpacked values differ from torch's")
    size = (states.nbytes + sum(part.nbytes for part in packed)) // 2
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    copy = microseconds(lambda: target.copy_(source))[0]
    row = {"copy_us": f"{copy:.1f}"}
    for name, run in (
        ("pack", lambda: quantize_pack(states, nbits, 32, axis, packed)),
        ("unpack", lambda: unpack_dequantize(*packed, nbits, 32, axis, restored)),
    ):
        median, low, high = microseconds(run)
        times = {f"{name}_us": median, f"{name}_p20_us": low, f"{name}_p80_us": high}
        row |= {key: f"{value:.1f}" for key, value in times.items()} | {f"{name}_of_copy": f"{copy / median:.2f}"}
    return row


def attention_rows(cases: list[Case]) -> Rows:
    shape = ("name", "kv_heads", "head_dim", "batch", "tokens")
    return [({key: str(getattr(case, key)) for key in shape}, partial(attention_row, case)) for case in cases]


def measure(cases: Rows, path: Path, machine: str) -> bool:
    """Write the table of ``cases``, but for rows that are there already; whether all went well."""
    table = Table(path, list(cases[0][0]), machine)
    for key, run in cases:
        if not table.has(key):
            table.add(key | attempt(run, LIMIT))
            gc.collect()
            torch.cuda.empty_cache()
    return all(row["status"] == "ok" for row in table.rows)


PARTS: dict[str, Callable[[], Rows]] = {
    "attention": lambda: attention_rows(ATTENTION),
    "formats": lambda: attention_rows(FORMATS),
    "pack": lambda: [({"bits": str(bits), "axis": axis}, partial(pack_row, bits, axis)) for bits, axis in PACK],
    "host": lambda: [({"cache": name}, partial(host_row, *case)) for name, case in host_cases().items()],
    "first-call": lambda: [({"run": str(run)}, first_call_row) for run in (1, 2)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one part alone, default all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="recorded with the results")
    parser.add_argument("--plot", action="store_true", help="only draw the tables that are in --out, without a GPU")
    args = parser.parse_args()
    parts, failed = [args.only] if args.only else list(PARTS), []
    if not args.plot:
        import triton  # what draws the tables alone does without

        args.out.mkdir(exist_ok=True, parents=True)
        machine = (
            f"{torch.cuda.get_device_name()}, kivicache {__version__} {args.commit}, torch {torch.__version__}, "
            f"triton {triton.__version__}, transformers {transformers.__version__}; bfloat16, {HEADS} query heads; "
            "unless said otherwise groups of 32, 8 kv heads, head_dim 128, 32 sinks, at least 128 residual tokens"
        )
        print(machine, flush=True)
        for name in parts:
            path = args.out / f"decode_{name.replace('-', '_')}.csv"
            if not measure(PARTS[name](), path, machine):
                failed.append(name)
    tables = [args.out / f"decode_{name}.csv" for name in parts if name in ("attention", "formats")]
    tables = [table for table in tables if table.exists()]
    if args.plot and not tables:
        parser.error(f"--plot: nothing to draw in {args.out}; allowed: a folder with a table of attention or formats")
    for table in tables:
        plot(table)
    if failed:
        raise SystemExit(f"cases failed in: {', '.join(failed)}")


if __name__ == "__main__":
    main()
