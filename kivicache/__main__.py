"""The command line: ``kivicache COMMAND``, or ``python -m kivicache COMMAND``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from transformers.utils import logging as transformers_logging

from kivicache import __version__, demo, tuning
from kivicache.caches import CacheSpec
from kivicache.config import CHOICES, PRESETS, KIVIConfig
from kivicache.data import load_text
from kivicache.evaluation import OnProgress, evaluate
from kivicache.evaluation_report import render, report
from kivicache.models import EMBEDDED, PROMPT, MissingPackage, load_model
from kivicache.objectives import TaskErrors
from kivicache.tasks import TASKS, parse_task

if TYPE_CHECKING:
    from rich.progress import Progress

LOG_SECONDS = 30  # where there is no terminal to draw bars on, a line as often


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for what the user can mend, said in one line, 130 on Ctrl-C."""
    parser = _Parser(prog="kivicache", description="A key-value cache in 2, 4 or 8 bits for transformers models.")
    parser.add_argument("--version", action="version", version=f"kivicache {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_estimate(commands)
    _add_eval(commands)
    _add_tune(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ImportError, OSError, ValueError, NotImplementedError) as error:
        print(f"kivicache {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    description = "Generate the same text with DynamicCache and with KIVICache, and compare text, speed and memory."
    parser = commands.add_parser("demo", help="compare KIVICache with full precision", description=description)
    parser.add_argument("--model", metavar="NAME", help=f"hub model or local folder (default: {EMBEDDED}, no network)")
    _add_config(parser)
    parser.add_argument("--max-new-tokens", type=_positive, default=96, metavar="N", help="default: %(default)s")
    parser.add_argument("--prompt", type=_text, default=PROMPT, metavar="TEXT", help="default: a page of Alice")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--json", action="store_true", help="print the results as JSON and nothing else")
    parser.set_defaults(run=_demo)


def _add_estimate(commands: argparse._SubParsersAction[_Parser]) -> None:
    description = "Bytes of a model's weights and cache, from its config alone, and what fits into a GPU."
    parser = commands.add_parser("estimate", help="bytes of weights and cache", description=description)
    parser.add_argument("--model", metavar="NAME", required=True, help="hub model, local folder or config.json")
    parser.add_argument("--context", type=_positive, required=True, metavar="N", help="tokens of each sequence")
    parser.add_argument("--batch", type=_positive, default=1, metavar="B", help="sequences (default: %(default)s)")
    _add_config(parser)
    parser.add_argument("--gpu-memory", type=_gib, metavar="GIB", help="also say what fits into so many GiB")
    parser.add_argument("--fixed", action="store_true", help="a cache of fixed capacity, max_cache_len=N")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, in bytes")
    parser.set_defaults(run=_estimate)


def _estimate(args: argparse.Namespace) -> int:
    from kivicache.estimate import estimate

    found = estimate(
        args.model,
        _config(args),
        context=args.context,
        batch=args.batch,
        gpu_memory=args.gpu_memory,
        fixed=args.fixed,
    )
    if args.json:
        print(json.dumps(vars(found), indent=2))
    else:
        width = max(len(label) for label, _ in found.rows())
        print("\n".join(f"{label:<{width}}  {text}" for label, text in found.rows()))
    return 0


def _demo(args: argparse.Namespace) -> int:
    config, device = _config(args), _device(args.device)
    with _progress(args.model, args.max_new_tokens) as on_progress:
        on_progress("loading model", 0)
        # 16 bits, as models are served; the embedded copy is stored in 32
        model, tokenizer = load_model(args.model, device, torch.bfloat16 if args.model is None else "auto")
        on_progress("loading model", 1)
        result = demo.compare(model, tokenizer, args.prompt, config, args.max_new_tokens, on_progress)
    if args.json:
        print(json.dumps(demo.as_dict(result), indent=2))
    else:
        from rich.console import Console

        demo.render(result, Console(highlight=False, markup=False))
    return 0


@contextmanager
def _progress(model: str | None, max_new_tokens: int) -> Iterator[demo.OnProgress]:
    """Progress bars on stderr, one per stage, that vanish when all is done."""
    if find_spec("rich") is None:
        raise MissingPackage("rich")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    _quiet_unless_it_downloads(model)
    console = Console(file=sys.stderr)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stderr=False,
        disable=not console.is_terminal,
    ) as progress:
        totals = (1, max_new_tokens, max_new_tokens)
        tasks = {s: progress.add_task(s, total=n, start=False) for s, n in zip(demo.STAGES, totals, strict=True)}

        def on_progress(stage: str, done: int) -> None:
            if done == 0:
                progress.start_task(tasks[stage])
            progress.update(tasks[stage], completed=done)

        yield on_progress


def _quiet_unless_it_downloads(model: str | None) -> None:
    """A download shows the hub's own bars; where there is none, they would only overwrite ours."""
    if model is None or Path(model).is_dir():
        transformers_logging.disable_progress_bar()


def _add_eval(commands: argparse._SubParsersAction[_Parser]) -> None:
    description = (
        "Measure what cache settings cost on a model, through the cache. A cache is dynamic, kivi, kivi:2, kivi:k4v2, "
        "kivi:2:hadamard, kivi:3bit, kivi:nbits=2,sink_length=4, paper:2, FILE.yaml, hf-quanto:4, hf-hqq:4 or hf-fp8. "
        f"A task is one of {', '.join(TASKS)}, with its own fields: fidelity:data=FILE,steps=512 or "
        "passkey:lengths=[1024,4096]."
    )
    parser = commands.add_parser("eval", help="measure what settings cost on a model", description=description)
    parser.add_argument("--model", metavar="NAME", help=f"hub model or local folder (default: {EMBEDDED}, no network)")
    parser.add_argument("--cache", nargs="+", default=["dynamic", "kivi:4", "kivi", "kivi:2"], metavar="SETTING")
    parser.add_argument("--task", nargs="+", default=["fidelity", "greedy", "passkey"], metavar="TASK")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N items of each task")
    parser.add_argument("--out", type=Path, default=Path("kivicache-eval"), metavar="FOLDER", help="%(default)s")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    for package in ("rich", "matplotlib"):
        if find_spec(package) is None:
            raise MissingPackage(package, 'pip install "kivicache[eval]"')
    from rich.console import Console

    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out: got the file {args.out}; allowed: a folder")
    device = _device(args.device)
    caches = [CacheSpec.parse(text) for text in args.cache]
    tasks = [parse_task(text) for text in args.task]
    _quiet_unless_it_downloads(args.model)
    model, tokenizer = load_model(args.model, device)
    store = args.out / "records.jsonl"
    with _time_left() as on_progress:
        options = {"store": store, "limit": args.limit, "on_progress": on_progress}
        results = evaluate(model, tokenizer, caches, tasks, **options)
    render(results, Console(highlight=False, markup=False))
    for file in report(results, args.out, str(model.name_or_path)):
        print(file)
    return 0


@contextmanager
def _time_left() -> Iterator[OnProgress]:
    """One progress bar on stderr that says what runs, how much is done, and how long the rest will take."""
    with _bars("{task.description:<28.28}", transient=True) as progress:
        bar, log = progress.add_task("", note=""), _lines(progress)

        def on_progress(done: int, total: int, what: str) -> None:
            progress.update(bar, completed=done, total=total, description=what)
            log(f"{what}: {done} of {total}", done == total)

        yield on_progress


def _bars(description: str, transient: bool) -> Progress:
    """Progress bars on stderr with the time left, and a note behind it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(file=sys.stderr)
    left = TimeRemainingColumn(elapsed_when_finished=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), left)
    return Progress(
        TextColumn(description),
        *columns,
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=transient,
        disable=not console.is_terminal,
        speed_estimate_period=600,
    )


def _lines(progress: Progress) -> Callable[[str, bool], None]:
    """Prints what it is given on stderr where the bars are off, at most every ``LOG_SECONDS``, but each end."""
    last = -float("inf")

    def log(text: str, ends: bool) -> None:
        nonlocal last
        if progress.disable and (ends or time.monotonic() - last >= LOG_SECONDS):
            last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    return log


def _add_tune(commands: argparse._SubParsersAction[_Parser]) -> None:
    description = "Search the bits of every layer under a budget (KVTuner) and write them as YAML for KIVICache."
    parser = commands.add_parser("tune", help="search the best bits per layer", description=description)
    defaults = tuning.TuningSettings
    parser.add_argument("--model", metavar="NAME", help=f"hub model or local folder (default: {EMBEDDED}, no network)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE", help="calibration text (default: Python's own language reference)")
    text.add_argument("--dataset", metavar="NAME", help="OWNER/NAME[/CONFIG[/SPLIT]] on the hub, with a text column")
    parser.add_argument("--budget", type=float, required=True, metavar="BITS", help="true bits per packed value")
    parser.add_argument("--trials", type=_positive, default=defaults.trials, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("best.yaml"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--config", metavar="FILE", help="the base: what the search leaves alone (default: mse)")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[32, 64], metavar="N", help="default: 32 64")
    rotations = [choice or "none" for choice in CHOICES["rotation"]]
    parser.add_argument("--rotations", nargs="+", choices=rotations, default=rotations, help="default: all")
    parser.add_argument(
        "--groups",
        type=_positive,
        default=defaults.groups,
        metavar="N",
        help="of layers that choose alike (%(default)s)",
    )
    parser.add_argument("--per-head", action="store_true", help="choose bits for every kv head, not every layer")
    parser.add_argument(
        "--sequences", type=_positive, default=defaults.sequences, metavar="N", help="pieces of the text (%(default)s)"
    )
    parser.add_argument(
        "--prefill",
        type=_positive,
        default=defaults.prefill,
        metavar="N",
        help="tokens of each that are packed (%(default)s)",
    )
    parser.add_argument("--task", metavar="TASK", help="minimize its errors, not KL: gsm8k:data=FILE,limit=20")
    parser.add_argument("--storage", metavar="FILE|URL", help="journal or optuna database (default: OUT.journal)")
    parser.add_argument("--study", default="kivicache", metavar="NAME", help="in the storage; default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on with the study, also beside other workers on it")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s; give each worker its own")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> int:
    for package in ("optuna", "sklearn", "matplotlib", "rich"):
        if find_spec(package) is None:
            raise MissingPackage(package, 'pip install "kivicache[tune]"')
    from rich.console import Console

    from kivicache.tuning_report import plot_front, plot_sensitivity, render_tuning

    settings = {
        "budget": args.budget,
        "trials": args.trials,
        "base": tuning.DEFAULT_BASE if args.config is None else _config_file(args.config),
        "group_sizes": tuple(args.group_sizes),
        "rotations": tuple(None if name == "none" else name for name in args.rotations),
        "per_head": args.per_head,
        "groups": args.groups,
        "sequences": args.sequences,
        "prefill": args.prefill,
        "seed": args.seed,
    }
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise ValueError(f"--out: got {args.out}; allowed: a file in a folder that there is")
    tuning.TuningSettings(**settings)  # what is wrong is said before the model is loaded
    task = None if args.task is None else parse_task(args.task)
    texts = _calibration_texts(args)
    device = _device(args.device)
    _quiet_unless_it_downloads(args.model)
    model, tokenizer = load_model(args.model, device)
    storage = args.storage or f"{args.out}.journal"
    with _stages(tuning.STAGES) as on_progress, _resumable(storage):
        result = tuning.run(
            model,
            tokenizer,
            texts,
            objective=None if task is None else TaskErrors(model, tokenizer, task),
            storage=storage,
            study_name=args.study,
            resume=args.resume,
            on_progress=on_progress,
            **settings,
        )
    result.config.to_yaml(args.out)
    console = Console(highlight=False, markup=False)
    render_tuning(result, console)
    for plot, name in ((plot_front, "front"), (plot_sensitivity, "sensitivity")):
        print(plot(result, args.out.with_suffix(f".{name}.png")))
    print(f"{args.out}: use it as KIVICache({str(args.out)!r}, config=model.config)")
    return 0


@contextmanager
def _resumable(storage: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted: what was measured is kept in {storage}; --resume goes on with it", file=sys.stderr)
        raise


def _calibration_texts(args: argparse.Namespace) -> list[str]:
    if args.text is not None and not Path(args.text).is_file():
        raise ValueError(f"--text: {args.text}: no such file")
    source = args.text or args.dataset
    return tuning.default_texts() if source is None else [load_text(source)]


@contextmanager
def _stages(stages: Sequence[str]) -> Iterator[tuning.OnProgress]:
    """On stderr, for each stage a progress bar with the time left."""
    width = max(map(len, stages))
    with _bars(f"{{task.description:<{width}}}", transient=False) as progress:
        bars = {stage: progress.add_task(stage, total=None, start=False, note="") for stage in stages}
        log = _lines(progress)

        def on_progress(stage: str, done: int, total: int, note: str) -> None:
            if not progress.tasks[bars[stage]].started:
                progress.start_task(bars[stage])
            progress.update(bars[stage], completed=done, total=total, description=stage, note=note)
            log(f"{stage}: {done} of {total} {note}".rstrip(), done == total)

        yield on_progress


def _add_config(parser: _Parser) -> None:
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--nbits", type=int, choices=CHOICES["nbits"], help="bits of keys and values (default: 4 and 2)")
    one.add_argument("--preset", choices=PRESETS, help="the best setting found for so many bits, with rotation")
    one.add_argument("--config", metavar="FILE", help="a KIVIConfig as YAML")


def _config(args: argparse.Namespace) -> KIVIConfig:
    if args.preset is not None:
        return KIVIConfig.preset(args.preset)
    return KIVIConfig(nbits=args.nbits) if args.config is None else _config_file(args.config)


def _config_file(path: str) -> KIVIConfig:
    try:
        return KIVIConfig.from_yaml(path)
    except OSError as error:
        raise ValueError(f"--config: {path}: {error.strerror}") from error


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(f"--device: {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ValueError("--device: 'meta' cannot be used: it computes nothing")
    return device


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a whole number from 1")
    return int(text)


def _gib(text: str) -> int:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a positive number of GiB")
    return int(size * 2**30)


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("got an empty text")
    return text


if __name__ == "__main__":
    sys.exit(main())
