"""Decode attention over packed bytes against the best 16-bit attention of PyTorch, on one GPU in one run.

    python -m benchmarks.decode

For every case: first the error against float32 attention over the dequantized values, then medians of CUDA-graph
replays with a cold L2 cache, the exact tokens (sinks and residual) included. The baseline is the faster of cuDNN and
flash attention in bfloat16 over as many tokens. Then quantizing and packing a prompt against copying as many bytes,
the host's time per layer and step, and the seconds that the first fused step of a fresh process compiles.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kivicache import KIVICache, KIVIConfig, __version__
from kivicache.attention import PackedStates, fused_attention
from kivicache.layer import KIVILayer
from kivicache.triton.pack import quantize_pack
from kivicache.triton.unpack import unpack_dequantize

RESULTS = Path(__file__).parent / "results"
HEADS, HEAD_DIM = 32, 128
CASES = [  # bits of keys and values, kv heads, batch, tokens
    (2, 2, 8, 8, 32768),
    (2, 2, 8, 1, 131072),
    (2, 2, 32, 8, 16384),
    (4, 4, 8, 8, 32768),
    (4, 2, 8, 8, 32768),
    (8, 8, 8, 8, 32768),
    (2, 2, 8, 32, 4096),
    (4, 2, 8, 8, 4096),
    (4, 2, 8, 1, 32768),
    (4, 2, 8, 1, 8192),
    (2, 2, 8, 1, 4096),
    (4, 2, 8, 1, 4096),
    (4, 4, 8, 1, 4096),
    (8, 8, 8, 1, 4096),
    (4, 2, 8, 1, 1024),
]


def microseconds(run: Callable[[], object]) -> tuple[float, float, float]:
    """Median, and the 20th and 80th percentile, of replays of ``run`` in a CUDA graph, the L2 cache emptied before."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        low, median, high = triton.testing.do_bench(graph.replay, warmup=20, rep=80, quantiles=[0.2, 0.5, 0.8])
    return 1000 * median, 1000 * low, 1000 * high


def packed_layer(nbits_key: int, nbits_value: int, kv_heads: int, batch: int, tokens: int) -> list[PackedStates]:
    """Keys and values of ``tokens`` random tokens as a decode step meets them."""
    layer = KIVILayer(KIVIConfig(nbits_key=nbits_key, nbits_value=nbits_value).layer(0))
    shape = (batch, kv_heads, tokens, HEAD_DIM)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    layer.update(keys[:, :, :-1], values[:, :, :-1])
    return list(layer.update(keys[:, :, -1:], values[:, :, -1:]))


def baseline(query: Tensor, keys: Tensor, values: Tensor) -> tuple[str, float]:
    """The faster of PyTorch's 16-bit attention kernels and its median in microseconds."""
    times = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            times[name] = microseconds(
                partial(scaled_dot_product_attention, query, keys, values, enable_gqa=keys.shape[1] != HEADS)
            )[0]
    best = min(times, key=times.__getitem__)
    return best, times[best]


def attention_row(nbits_key: int, nbits_value: int, kv_heads: int, batch: int, tokens: int) -> dict[str, object]:
    keys, values = packed_layer(nbits_key, nbits_value, kv_heads, batch, tokens)
    query = torch.randn(batch, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    output = fused_attention(query, keys, values).float()
    dense = [states.dense() for states in (keys, values)]
    grouped = query.float().view(batch, kv_heads, -1, HEAD_DIM)
    expected = torch.cat([  # one sequence at a time: float32 copies of all of them would not fit
        (grouped[i] @ dense[0][i].float().mT * HEAD_DIM**-0.5).softmax(-1) @ dense[1][i].float() for i in range(batch)
    ]).view_as(output)  # fmt: skip
    error = ((output - expected).norm() / expected.norm()).item()
    if not error < 8e-3:
        raise AssertionError(f"K{nbits_key}V{nbits_value}, {kv_heads} kv heads, batch {batch}, {tokens}: {error:.1e}")
    median, low, high = microseconds(partial(fused_attention, query, keys, values))
    name, base = baseline(query, *dense)
    held = sum(states.kivi_states.memory().total - states.kivi_states.memory().slack for states in (keys, values))
    return {
        "case": f"K{nbits_key}V{nbits_value}",
        "kv_heads": kv_heads,
        "batch": batch,
        "tokens": tokens,
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


def pack_rows(nbits: int, axis: str, tokens: int = 32768) -> list[dict[str, object]]:
    """Pack a prompt of 8 heads, and unpack it again; the ceiling is a copy that reads and writes as many bytes."""
    states = torch.randn(1, 8, tokens, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    packed = quantize_pack(states, nbits, 32, axis)
    size = (states.nbytes + sum(part.nbytes for part in packed)) // 2
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy = microseconds(lambda: target.copy_(source))[0]
    rows = []
    for name, run in (
        ("pack", lambda: quantize_pack(states, nbits, 32, axis, packed)),
        ("unpack", lambda: unpack_dequantize(*packed, nbits, 32, axis, states)),
    ):
        median, low, high = microseconds(run)
        rows.append(
            {
                "direction": name,
                "bits": nbits,
                "axis": axis,
                "tokens": tokens,
                "copy_us": f"{copy:.1f}",
                "kivicache_us": f"{median:.1f}",
                "p20_us": f"{low:.1f}",
                "p80_us": f"{high:.1f}",
                "of_copy_bandwidth": f"{copy / median:.2f}",
            }
        )
    return rows


def host_rows() -> list[dict[str, object]]:
    """Host time and kernels of one layer's update and attention in eager decode, without waiting for the GPU."""
    module = SimpleNamespace(num_key_value_groups=4, is_causal=True)
    rows = []
    every = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    for name, cache, kernels in (
        # cuDNN plans anew for every length, so that eager decode is far slower with it than with flash attention
        ("DynamicCache, cuDNN allowed", DynamicCache(), every),
        ("DynamicCache, flash", DynamicCache(), [SDPBackend.FLASH_ATTENTION]),
        ("KIVICache", KIVICache(KIVIConfig(nbits=2)), every),
    ):
        prompt = torch.randn(1, 8, 1024, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        token, query = (
            prompt[:, :, :1].clone(),
            torch.randn(1, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda"),
        )
        cache.update(prompt, prompt, 0)

        def step(cache: DynamicCache = cache, token: Tensor = token, query: Tensor = query) -> None:
            sdpa_attention_forward(module, query, *cache.update(token, token, 0), None, scaling=HEAD_DIM**-0.5)

        with sdpa_kernel(kernels):
            for _ in range(64):
                step()
            medians = []
            for _ in range(7):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(32):  # one flush among them
                    step()
                medians.append((time.perf_counter() - start) / 32 * 1e6)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
                for _ in range(32):
                    step()
                torch.cuda.synchronize()
        launches = sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")
        rows.append(
            {"cache": name, "host_us": f"{sorted(medians)[3]:.1f}", "kernels_per_step": f"{launches / 32:.1f}"}
        )
    return rows


def first_call_seconds() -> dict[str, object]:
    code = """
import os, tempfile, time
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
import torch
from benchmarks.decode import HEADS, HEAD_DIM, fused_attention, packed_layer
torch.zeros(1, device="cuda")
start = time.perf_counter()
keys, values = packed_layer(2, 2, 8, 1, 1024)
torch.cuda.synchronize()
packed = time.perf_counter()
fused_attention(torch.randn(1, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda"), keys, values)
torch.cuda.synchronize()
print(packed - start, time.perf_counter() - packed)
"""
    output = subprocess.run(["python3", "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return {"first_pack_s": f"{float(output[0]):.1f}", "first_attention_s": f"{float(output[1]):.1f}"}


def write(name: str, rows: list[dict[str, object]], folder: Path, machine: str) -> None:
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {machine}\n")
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in rows[0]}, *rows]:
        print("  ".join(f"{value!s:>{widths[key]}}" for key, value in row.items()))
    print()


def plot(folder: Path) -> None:
    """Draw ``decode_attention.csv``: the speedup of every case, and what the bytes would allow."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with (folder / "decode_attention.csv").open(encoding="utf-8") as file:
        machine = next(file).removeprefix("# ").split(",")[0]
        rows = list(csv.DictReader(file))
    labels = [f"{r['case']}, batch {r['batch']}, {int(r['tokens']) // 1024}k, {r['kv_heads']} kv heads" for r in rows]
    speedups = [float(row["speedup"]) for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 0.36 * len(rows) + 1.3), layout="constrained")
    axes.barh(labels, [float(row["byte_ceiling"]) for row in rows], color="#e3e3e3", label="ceiling by bytes")
    bars = axes.barh(labels, speedups, color="#0b6e4f", label="measured")
    axes.bar_label(bars, [f"{speedup:.2f}x" for speedup in speedups], padding=4)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(f"speedup of decode attention over the best 16-bit attention of PyTorch ({machine})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(folder / "decode_attention.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="recorded with the results")
    parser.add_argument("--plot", action="store_true", help="only draw the table that is in --out, without a GPU")
    args = parser.parse_args()
    if args.plot:
        return plot(args.out)
    args.out.mkdir(exist_ok=True, parents=True)
    machine = (
        f"{torch.cuda.get_device_name()}, kivicache {__version__} {args.commit}, torch {torch.__version__}, "
        f"triton {triton.__version__}, transformers {transformers.__version__}; bfloat16 query, {HEADS} query heads, "
        f"head_dim {HEAD_DIM}, groups of 32, 32 sinks, 128 to 159 residual tokens"
    )
    print(machine)
    write("decode_first_call", [first_call_seconds()], args.out, machine)
    write("decode_attention", [attention_row(*case) for case in CASES], args.out, machine)
    cases = [(bits, axis) for axis in ("channel", "token") for bits in (2, 4, 8)]
    write("decode_pack", [row for case in cases for row in pack_rows(*case)], args.out, machine)
    write("decode_host", host_rows(), args.out, machine)


if __name__ == "__main__":
    main()
