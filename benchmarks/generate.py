"""`generate` from end to end: KIVICache, growing and of fixed capacity, beside what transformers has, on one GPU.

    python -m benchmarks.generate --model llama-3.1-8b --batch 1 8 --prompt 1024 8192 --new 64
    python -m benchmarks.generate --filled --batch 64 --prompt 32768 --caches kivi-2-fixed
    python -m benchmarks.generate --fit batch --prompt 32768
    python -m benchmarks.generate --plot

Models are shapes with random weights, made on the device (speed and memory do not depend on the weights), or any model
by name. A case is a model, a cache, a batch, a prompt and new tokens; rows are added to the table case by case, those
that are there already are not measured again, and no case is begun once ``--budget`` seconds are over: so a long table
can be made in slices. With ``--filled`` the cache is given random keys and values for all but the prompt's last token,
layer by layer as a prompt gives them: the decode steps are the same, without the minutes that long prompts take.
``--fit`` looks for the largest batch, or the longest context, whose decode step fits behind a cache filled so.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    QuantizedCache,
    Qwen3Config,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks.harness import Table, attempt, peak, release, synchronize, weights
from kivicache import KIVICache, KIVIConfig, __version__

RESULTS = Path(__file__).parent / "results"
LONGEST = 2**20
SHAPES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama-3.1-8b": partial(LlamaConfig, vocab_size=128256, intermediate_size=14336, num_key_value_heads=8),
    "llama-2-7b": partial(LlamaConfig, vocab_size=32000, intermediate_size=11008, num_key_value_heads=32),
    "qwen3-4b": partial(
        Qwen3Config,
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "tiny": partial(LlamaConfig, vocab_size=100, hidden_size=128, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1),
}  # fmt: skip
KIVI = {
    "kivi-2": KIVIConfig(nbits=2),
    "kivi-4": KIVIConfig(nbits=4),
    "kivi-k4v2": KIVIConfig(nbits_key=4, nbits_value=2),
    "kivi-3bit": KIVIConfig.preset("3bit"),
    "kivi-2-r32": KIVIConfig(nbits=2, residual_length=32, sink_length=4),
    "kivi-2-paper-r32": KIVIConfig(nbits=2, residual_length=32, sink_length=0, policy="paper"),
}


def caches() -> dict[str, Callable[[PreTrainedConfig, int], Cache]]:
    """Name -> the cache for a model's config and so many tokens."""
    made: dict[str, Callable[[PreTrainedConfig, int], Cache]] = {
        "dynamic": lambda config, _: DynamicCache(config=config),
        "static": lambda config, tokens: StaticCache(config=config, max_cache_len=tokens),
    }
    for name, cfg in KIVI.items():
        made[name] = lambda config, _, cfg=cfg: KIVICache(cfg, config=config)
        if cfg.policy == "window":
            made[f"{name}-fixed"] = lambda config, n, cfg=cfg: KIVICache(cfg, config=config, max_cache_len=n)
    for backend, nbits in (("quanto", 2), ("quanto", 4), ("hqq", 2), ("hqq", 4)):
        made[f"{backend}-{nbits}"] = lambda config, _, b=backend, n=nbits: QuantizedCache(b, config, nbits=n)
    made["fp8"] = lambda config, _: QuantizedCache("fp8", config)
    return made


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Never stops; notes when each token was there. `generate` waits for the GPU at each token anyhow."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def load(name: str, layers: int | None, device: str) -> PreTrainedModel:
    """The model in bfloat16: a shape with random weights, or one by name."""
    torch.manual_seed(0)
    shape = SHAPES.get(name)
    config = shape(max_position_embeddings=LONGEST) if shape else AutoConfig.from_pretrained(name)
    config.num_hidden_layers = layers or config.num_hidden_layers
    if shape:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.bfloat16).to(device)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.eval()


def generate(model: PreTrainedModel, cache: Cache, input_ids: Tensor, new: int) -> tuple[float, list[float]]:
    """When it began, and when each token was there."""
    clock = Clock()
    synchronize(model.device)
    start = time.perf_counter()
    model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=cache,
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return start, clock.times


def measure(model: PreTrainedModel, name: str, batch: int, prompt: int, new: int, filled: bool) -> dict[str, str]:
    """One case: a short run that compiles what is to be compiled, and then the one that counts."""
    make = partial(caches()[name], model.config, prompt + new)
    input_ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=model.device)
    cache = make()
    if filled:
        fill(model, cache, batch, prompt - 1)
    start, times = generate(model, cache, input_ids, min(new, 8))
    first_run = times[-1] - start
    if cache.is_compileable:
        cache.reset()  # a captured graph writes to the memory of this very cache
    else:
        del cache
        cache = make()
    if filled:
        fill(model, cache, batch, prompt - 1)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start, times = generate(model, cache, input_ids, new)
    steps = [1000 * (b - a) for a, b in itertools.pairwise(times)]
    compiled = torch._dynamo.utils.counters
    row = {
        "prefill_ms": "" if filled else f"{1000 * (times[0] - start):.1f}",
        "step_ms": f"{statistics.median(steps):.2f}",
        "step_p90_ms": f"{sorted(steps)[int(0.9 * len(steps))]:.2f}",
        "decode_tokens_per_s": f"{batch * len(steps) / (times[-1] - times[0]):.1f}",
        "total_tokens_per_s": "" if filled else f"{batch * new / (times[-1] - start):.1f}",
        "first_run_s": f"{first_run:.1f}",
        "graphs": str(compiled["stats"]["unique_graphs"]),
        "cudagraph_skips": str(compiled["inductor"]["cudagraph_skips"]),
    }
    return row | peak(model)


@torch.no_grad()
def fill(model: PreTrainedModel, cache: Cache, batch: int, tokens: int) -> None:
    """Random keys and values for ``tokens`` tokens, given as a prompt gives them: layer by layer."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, tokens, head_dim)
    states = torch.randn(shape, dtype=model.dtype, device=model.device)
    for layer_idx in range(config.num_hidden_layers):
        cache.update(states, states, layer_idx)


@torch.no_grad()
def fits(model: PreTrainedModel, name: str, batch: int, context: int) -> bool:
    """Whether a cache with ``batch`` sequences of ``context`` tokens and a decode step fit into the memory."""
    try:
        cache = caches()[name](model.config, context)
        fill(model, cache, batch, context - 2)
        for _ in range(2):
            model(input_ids=torch.zeros(batch, 1, dtype=torch.long, device=model.device), past_key_values=cache)
        synchronize(model.device)
    except torch.OutOfMemoryError:
        return False
    finally:
        cache = None
        release(model)
    return True


def largest(fits_with: Callable[[int], bool], step: int, stop: int) -> int:
    """The largest multiple of ``step`` that fits, to one part in 32; 0 where not even ``step`` does."""
    low, high = 0, step
    while high < stop and fits_with(high):
        low, high = high, 2 * high
    while low and high - low > max(step, low // 32):
        middle = (low + high) // (2 * step) * step
        low, high = (middle, high) if fits_with(middle) else (low, middle)
    return low


GRID = ["model", "layers", "cache", "memory_gib", "batch", "prompt", "filled", "new"]
FIT = ["model", "layers", "cache", "memory_gib", "fit", "of"]


def run_grid(args: argparse.Namespace, model: PreTrainedModel, key: dict[str, str]) -> dict[str, str]:
    name = key["cache"]
    model.set_attn_implementation("kivi" if name.startswith("kivi") else "sdpa")
    numbers = (int(key["batch"]), int(key["prompt"]), int(key["new"]))
    try:
        return attempt(partial(measure, model, name, *numbers, key["filled"] == "yes"), args.limit)
    finally:
        release(model)


def run_fit(args: argparse.Namespace, model: PreTrainedModel, key: dict[str, str]) -> dict[str, str]:
    name, of = key["cache"], int(key["of"])
    model.set_attn_implementation("kivi" if name.startswith("kivi") else "sdpa")

    def find() -> dict[str, str]:
        if args.fit == "batch":
            return {"largest": str(largest(lambda batch: fits(model, name, batch, of), 1, 4096))}
        return {"largest": str(largest(lambda context: fits(model, name, of, context), 1024, 16 * LONGEST))}

    start = time.perf_counter()
    return {**attempt(find, args.limit), "seconds": f"{time.perf_counter() - start:.0f}"}


def cases(args: argparse.Namespace, layers: int) -> list[dict[str, str]]:
    """The key of every row that is asked for."""
    common = {"model": args.model, "layers": str(layers), "memory_gib": str(args.memory_gib or "all")}
    if args.fit is None:
        common["filled"], common["new"] = "yes" if args.filled else "no", str(args.new)
        rows = [
            {**common, "cache": cache, "batch": str(batch), "prompt": str(prompt)}
            for batch, prompt, cache in itertools.product(args.batch, args.prompt, args.caches)
        ]
    else:
        given = args.prompt if args.fit == "batch" else args.batch
        rows = [
            {**common, "cache": cache, "fit": args.fit, "of": str(of)}
            for of, cache in itertools.product(given, args.caches)
        ]
    keys = GRID if args.fit is None else FIT
    rows = [{key: row[key] for key in keys} for row in rows]
    return [row for row in rows if re.search(args.case, "/".join(row.values()))]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3.1-8b", help=f"a model by name, or one of {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, help="as many layers only")
    parser.add_argument("--caches", nargs="+", default=list(caches()), choices=list(caches()), metavar="CACHE")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", nargs="+", type=int, default=[1024, 8192, 32768], help="tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--filled", action="store_true", help="random keys and values instead of the prompt's")
    parser.add_argument("--fit", choices=["batch", "context"], help="the largest that fits, by --prompt or --batch")
    parser.add_argument("--memory-gib", type=float, help="use so much of the GPU at most")
    parser.add_argument("--case", default="", help="a pattern: only the cases whose key, joined by /, has it")
    parser.add_argument("--limit", type=int, default=120, help="seconds for a case")
    parser.add_argument("--budget", type=int, default=540, help="no case is begun after so many seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="recorded with the results")
    parser.add_argument("--plot", action="store_true", help="only draw the tables that are in --out")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.plot:
        from benchmarks.generate_plot import plot, plot_fit  # matplotlib is optional

        plot(args.out)
        return plot_fit(args.out)
    warnings.filterwarnings("ignore", category=FutureWarning)  # past_key_values is called cache since 5.24
    transformers.utils.logging.set_verbosity_error()
    begin = time.perf_counter()
    cuda = args.device.startswith("cuda")
    if cuda and args.memory_gib:
        total = torch.cuda.get_device_properties(args.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(args.memory_gib * 2**30 / total, 1.0))
    machine = (
        f"{torch.cuda.get_device_name(args.device) if cuda else 'CPU'}, kivicache {__version__}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; bfloat16, greedy, random tokens"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    name, keys, run = ("generate", GRID, run_grid) if args.fit is None else ("generate_fit", FIT, run_fit)
    table = Table(args.out / f"{name}.csv", keys, machine)
    model = load(args.model, args.layers, args.device)
    print(f"{machine}; weights {weights(model) / 2**30:.2f} GiB; ready after {time.perf_counter() - begin:.0f} s")
    for key in cases(args, model.config.num_hidden_layers):
        if table.has(key):
            continue
        if time.perf_counter() - begin > args.budget:
            print(f"the budget of {args.budget} s is over: run the same command again for the rest")
            break
        table.add({**key, "commit": args.commit, **run(args, model, key)})


if __name__ == "__main__":
    main()
