"""The command line: ``kivicache COMMAND``, or ``python -m kivicache COMMAND``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch
from transformers.utils import logging as transformers_logging

from kivicache import __version__, demo, tuning
from kivicache.config import CHOICES, KIVIConfig
from kivicache.models import EMBEDDED, PROMPT, MissingPackage, load_model


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 for what the user can mend, said in one line on stderr."""
    parser = _Parser(prog="kivicache", description="A key-value cache in 2, 4 or 8 bits for transformers models.")
    parser.add_argument("--version", action="version", version=f"kivicache {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_tune(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ImportError, ValueError, NotImplementedError) as error:
        print(f"kivicache {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    description = "Generate the same text with DynamicCache and with KIVICache, and compare text, speed and memory."
    parser = commands.add_parser("demo", help="compare KIVICache with full precision", description=description)
    parser.add_argument("--model", metavar="NAME", help=f"hub model or local folder (default: {EMBEDDED}, no network)")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--nbits", type=int, choices=CHOICES["nbits"], help="bits of keys and values (default: 4 and 2)")
    bits.add_argument("--config", metavar="FILE", help="a KIVIConfig as YAML")
    parser.add_argument("--max-new-tokens", type=_positive, default=96, metavar="N", help="default: %(default)s")
    parser.add_argument("--prompt", type=_text, default=PROMPT, metavar="TEXT", help="default: a page of Alice")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--json", action="store_true", help="print the results as JSON and nothing else")
    parser.set_defaults(run=_demo)


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


def _add_tune(commands: argparse._SubParsersAction[_Parser]) -> None:
    description = "Search the bits of every layer under a budget (KVTuner) and write them as YAML for KIVICache."
    parser = commands.add_parser("tune", help="search the best bits per layer", description=description)
    parser.add_argument("--model", metavar="NAME", help=f"hub model or local folder (default: {EMBEDDED}, no network)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE", help="calibration text (default: Python's own language reference)")
    text.add_argument("--dataset", metavar="NAME[:CONFIG]", help="hub dataset with a text column, its train split")
    parser.add_argument("--budget", type=float, required=True, metavar="BITS", help="true bits per packed value")
    parser.add_argument("--trials", type=_positive, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("best.yaml"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--config", metavar="FILE", help="what the search does not choose, as YAML (default: mse)")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[32, 64], metavar="N", help="default: 32 64")
    parser.add_argument("--groups", type=_positive, metavar="N", help="about as many groups share a choice (12)")
    parser.add_argument("--per-head", action="store_true", help="choose bits for every kv head, not every layer")
    parser.add_argument("--task", metavar="FILE", help="minimize wrong answers to a GSM8K-like JSONL, instead of KL")
    parser.add_argument(
        "--storage", metavar="FILE|URL", help="journal file or optuna database URL (default: OUT.journal)"
    )
    parser.add_argument("--study", default="kivicache", metavar="NAME", help="in the storage; default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on with the study, also beside other workers on it")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s; give each worker its own")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> int:
    for package in ("optuna", "sklearn", "matplotlib", "rich"):
        if find_spec(package) is None:
            raise ImportError(f'{package} is not installed; install it with: pip install "kivicache[tune]"')
    from rich.console import Console

    from kivicache import tuning_report
    from kivicache.tasks import TaskErrors, read_questions

    base = {} if args.config is None else {"base": _config(args)}
    model, tokenizer = load_model(args.model, _device(args.device))
    questions = None if args.task is None else read_questions(args.task, limit=20)
    with _stages(tuning.STAGES) as on_progress:
        result = tuning.run(
            model,
            tokenizer,
            _texts(args),
            budget=args.budget,
            trials=args.trials,
            group_sizes=tuple(args.group_sizes),
            per_head=args.per_head,
            seed=args.seed,
            objective=None if questions is None else TaskErrors(model, tokenizer, questions),
            storage=args.storage or f"{args.out}.journal",
            study_name=args.study,
            resume=args.resume,
            on_progress=on_progress,
            **base,
            **({} if args.groups is None else {"groups": args.groups}),
        )
    result.config.to_yaml(args.out)
    pictures = [args.out.with_suffix(f".{name}.png") for name in ("front", "sensitivity")]
    tuning_report.plot_front(result, pictures[0])
    tuning_report.plot_sensitivity(result, pictures[1])
    console = Console(highlight=False, markup=False)
    tuning_report.render(result, console)
    console.print(f"{args.out}: use it as KIVICache({str(args.out)!r}, config=model.config); pictures: ", *pictures)
    return 0


def _texts(args: argparse.Namespace) -> list[str]:
    if args.text is not None:
        try:
            return [Path(args.text).read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text: {args.text}: {error}") from error
    return tuning.default_texts() if args.dataset is None else tuning.dataset_texts(args.dataset)


@contextmanager
def _stages(stages: Sequence[str]) -> Iterator[tuning.OnProgress]:
    """A progress bar with the time left for each stage, on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    width = max(map(len, stages))
    columns = TextColumn(f"{{task.description:<{width}}}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    left = TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
    with Progress(*columns, *left, console=Console(file=sys.stderr)) as progress:
        tasks = {stage: progress.add_task(stage, total=None, start=False, note="") for stage in stages}

        def on_progress(stage: str, done: int, total: int, note: str) -> None:
            progress.start_task(tasks[stage])
            progress.update(tasks[stage], completed=done, total=total, note=note)

        yield on_progress


@contextmanager
def _progress(model: str | None, max_new_tokens: int) -> Iterator[demo.OnProgress]:
    """Progress bars on stderr, one per stage, that vanish when all is done."""
    if find_spec("rich") is None:
        raise MissingPackage("rich")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    # A download shows the hub's own bars, and two kinds at once would overwrite each other.
    downloads = model is not None and not Path(model).is_dir()
    if not downloads:
        transformers_logging.disable_progress_bar()
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


def _config(args: argparse.Namespace) -> KIVIConfig:
    if args.config is None:
        return KIVIConfig(nbits=args.nbits)
    try:
        return KIVIConfig.from_yaml(args.config)
    except OSError as error:
        raise ValueError(f"--config: {args.config}: {error.strerror}") from error


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


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("got an empty text")
    return text


if __name__ == "__main__":
    sys.exit(main())
