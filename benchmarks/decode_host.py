"""What a decode step costs the host: microseconds per layer, and the seconds of a fresh process's first step."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kivicache import KIVICache, KIVIConfig

DEVICE = "cuda"
LAYERS, HEADS, KV_HEADS, HEAD_DIM, PROMPT = 32, 32, 8, 128, 1024
FIRST_CALL = """
import tempfile, os, time
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
import torch
from kivicache import KIVIConfig
from kivicache.attention import fused_attention
from kivicache.layer import KIVILayer
states, query = (torch.randn(1, heads, 1024, 128, dtype=torch.bfloat16, device="cuda") for heads in (8, 32))
torch.cuda.synchronize()
start = time.perf_counter()
layer = KIVILayer(KIVIConfig(nbits=2).layer(0))
layer.update(states, states)
torch.cuda.synchronize()
packed = time.perf_counter()
token = states[:, :, :1].contiguous()
fused_attention(query[:, :, :1], *layer.update(token, token))
torch.cuda.synchronize()
print(packed - start, time.perf_counter() - packed)
"""


class Attention(torch.nn.Module):
    """What transformers' sdpa asks of an attention layer."""

    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


HostCase = tuple[Callable[[], DynamicCache], Callable[[], AbstractContextManager[object]], int]


def host_cases() -> dict[str, HostCase]:
    """The cache, the attention it may take, and the steps that are timed at once.

    cuDNN, which sdpa prefers by default, plans anew for every length: eager decode is far slower with it.
    """
    return {
        "DynamicCache, sdpa as it comes": (DynamicCache, nullcontext, 4),
        "DynamicCache, flash alone": (DynamicCache, lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION), 32),
        "KIVICache": (lambda: KIVICache(KIVIConfig(nbits=2)), nullcontext, 32),
        "KIVICache, rotated": (lambda: KIVICache(KIVIConfig(nbits=2, rotation="hadamard")), nullcontext, 32),
    }


def host_row(
    make_cache: Callable[[], DynamicCache], attention: Callable[[], AbstractContextManager[object]], steps: int
) -> dict[str, str]:
    """Host time and kernels of a layer's update and attention in eager decode, without waiting for the GPU.

    KIVICache packs in one of 32 steps: 32 steps have one such among them.
    """
    module = Attention()
    prompt = torch.randn(1, KV_HEADS, PROMPT, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    token = prompt[:, :, :1].clone()
    query = torch.randn(1, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    cache = make_cache()

    def run(count: int) -> None:
        for _ in range(count):
            for layer in range(LAYERS):
                states = cache.update(token, token, layer)
                sdpa_attention_forward(module, query, *states, None, scaling=HEAD_DIM**-0.5)

    times = []
    with torch.no_grad(), attention():
        for layer in range(LAYERS):
            cache.update(prompt, prompt, layer)
        run(steps)
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run(steps)
            times.append((time.perf_counter() - start) / steps / LAYERS * 1e6)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            run(steps)
            torch.cuda.synchronize()
    launches = sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")
    return {
        "layers": str(LAYERS),
        "host_us": f"{sorted(times)[2]:.1f}",
        "lowest_us": f"{min(times):.1f}",
        "highest_us": f"{max(times):.1f}",
        "kernels_per_layer": f"{launches / steps / LAYERS:.1f}",
    }


def first_call_row() -> dict[str, str]:
    """Seconds to pack a prompt, and of the first decode step, where nothing is compiled yet."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], check=True, stdout=subprocess.PIPE, text=True, cwd=root, timeout=80
    )
    first_pack, first_step = done.stdout.split()[-2:]
    return {"first_pack_s": f"{float(first_pack):.1f}", "first_step_s": f"{float(first_step):.1f}"}
