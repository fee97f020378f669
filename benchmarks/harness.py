"""What a long benchmark needs: a case that fails or hangs is a result, and a table grows case by case."""

from __future__ import annotations

import csv
import gc
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kivicache.files import replacing


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(model: PreTrainedModel) -> dict[str, str]:
    if model.device.type != "cuda":
        return {"peak_gib": "", "peak_without_weights_gib": ""}
    held = torch.cuda.max_memory_allocated()
    return {"peak_gib": f"{held / 2**30:.2f}", "peak_without_weights_gib": f"{(held - weights(model)) / 2**30:.2f}"}


def weights(model: PreTrainedModel) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def release(model: PreTrainedModel) -> None:
    """Give back what a case held, its compiled step and CUDA graphs too."""
    vars(model).pop("_compiled_call", None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def attempt(run: Callable[[], dict[str, str]], limit: int) -> dict[str, str]:
    """The case's numbers and status "ok", or why there are none."""
    try:
        with time_limit(limit):
            return {"status": "ok", **run()}
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    except TimeoutError:
        return {"status": f"over {limit} s"}
    except Exception as error:  # a case that fails is a result: the others go on
        return {"status": f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"}


class Table:
    """A CSV with the machine in its first line, replaced at each row, and printed row by row.

    Args:
        path: of the file; rows that are there already are kept, where they are of the same machine.
        keys: the columns that say what a row is of.
        machine: what the rows were measured on, and with what.
    """

    def __init__(self, path: Path, keys: Sequence[str], machine: str):
        self.path, self.keys, self.machine = path, keys, machine
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(encoding="utf-8") as file:
                found = next(file).removeprefix("# ").strip()
                if found != machine:
                    raise ValueError(f"--out: {path} is of another machine: {found}; allowed: {machine}")
                self.rows = list(csv.DictReader(file))

    def has(self, key: dict[str, str]) -> bool:
        return any(all(row[name] == key[name] for name in self.keys) for row in self.rows)

    def add(self, row: dict[str, str]) -> None:
        self.rows.append(row)
        with replacing(self.path) as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
            file.write(f"# {self.machine}\n")
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in self.rows for name in row)), restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        print("  ".join(f"{name} {value}" for name, value in row.items() if value), flush=True)
