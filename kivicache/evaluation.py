"""The evaluation: every task with every cache, item by item, kept as it goes so that it can be interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kivicache import __version__
from kivicache.caches import NOTHING_PACKED, CacheSpec, cache_bits
from kivicache.models import fingerprint
from kivicache.tasks import Item, Subject, Task, parse_task

OnProgress = Callable[[int, int, str], object]  # (runs done, runs in all, what runs now)


@dataclass(frozen=True)
class Record:
    """What one cache gave on one item.

    Attributes:
        place: the item's, see [`Item`].
        scores: the task's.
        bits: see [`CacheBits`], of the cache as the item left it.
        seconds: what it took, the comparison with full precision apart.
    """

    place: Mapping[str, Any]
    scores: Mapping[str, Any]
    bits: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Result:
    """All that one cache gave on one task."""

    task: Task
    cache: CacheSpec
    records: Sequence[Record]

    @property
    def metrics(self) -> dict[str, float]:
        """The task's metrics over all items, behind the bits per value and per packed value.

        An item that packs nothing counts in the first alone: it says nothing of what a packed value takes.
        """
        packed = [record.bits["per_packed_value"] for record in self.records]
        packed = [bits for bits in packed if bits != NOTHING_PACKED] or [NOTHING_PACKED]
        bits = {
            "bits_per_value": fmean(record.bits["per_value"] for record in self.records),
            "bits_per_packed_value": fmean(packed),
        }
        return bits | self.task.summarize([dict(record.scores) for record in self.records])


class Store:
    """Records in a JSON-lines file, each under what it was measured with; a line that was cut off is forgotten."""

    def __init__(self, path: str | Path | None, subject: Subject):
        self.path = None if path is None else Path(path)
        self.setup = {
            "model": str(subject.model.name_or_path),
            "weights": fingerprint(subject.model),
            "dtype": str(subject.model.dtype).removeprefix("torch."),
            "device": subject.model.device.type,
            "kivicache": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        }
        self.records: dict[str, Record] = {}
        if self.path is not None and self.path.exists():
            try:
                lines = self.path.read_text(encoding="utf-8").split("\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"store: {self.path}: allowed: JSON lines in UTF-8; {error}") from error
            for line in lines:
                self._read(line)

    def key(self, task: Task, item: Item, cache: CacheSpec) -> dict[str, Any]:
        """What has to be equal for a stored record to count."""
        own = {"kind": cache.kind, "settings": dict(cache.settings), "libraries": cache.libraries}
        return {**self.setup, "task": task.label, "item": f"{item.name} {item.digest}", "cache": own}

    def find(self, key: Mapping[str, Any]) -> Record | None:
        return self.records.get(_as_text(key))

    def add(self, key: Mapping[str, Any], record: Record) -> None:
        self.records[_as_text(key)] = record
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # the newline stands first, so that a line which was cut off spoils no other
                file.write("\n" + json.dumps({"key": key, "record": asdict(record)}))

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
            self.records[_as_text(entry["key"])] = Record(**entry["record"])
        except (ValueError, KeyError, TypeError):
            return


def _as_text(key: Mapping[str, Any]) -> str:
    """One text for a key, read from a file or not: JSON makes texts of layer indices, and they sort otherwise."""
    return json.dumps(json.loads(json.dumps(key)), sort_keys=True)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    caches: Sequence[CacheSpec | str],
    tasks: Sequence[Task | str] = ("fidelity",),
    *,
    store: str | Path | None = None,
    limit: int | None = None,
    on_progress: OnProgress = lambda done, total, what: None,
) -> list[Result]:
    """Run every task with every cache, one sequence at a time.

    Args:
        model, tokenizer: as from [`load_model`].
        caches: settings in the grammar of `kivicache.caches`, or [`CacheSpec`]s.
        tasks: tasks in the grammar of [`parse_task`], or [`Task`]s.
        store: a file where every result is kept at once. What it holds already, of the same model, weights, dtype,
            versions, item and setting, is not measured again.
        limit: only the first so many items of each task.
        on_progress: called before each run and at the end.

    Returns:
        one [`Result`] per task and cache, in the order given.

    Raises:
        ValueError: naming the setting or task that cannot be read, the task without items, or the cache that fails on
            an item. What was measured before is kept.
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit: got {limit!r}; allowed: a whole number from 1")
    subject = Subject(model, tokenizer)
    specs = [CacheSpec.parse(cache) if isinstance(cache, str) else cache for cache in caches]
    chosen = [parse_task(task) if isinstance(task, str) else task for task in tasks]
    _check_unique("cache", [spec.name for spec in specs])
    _check_unique("task", [task.label for task in chosen])
    kept = Store(store, subject)
    items = [task.items(subject)[:limit] for task in chosen]
    for task, own in zip(chosen, items, strict=True):
        if not own:
            raise ValueError(f"task {task.label}: got no items; allowed: data of at least one, beyond its examples")
    for spec in specs:
        spec.new(model.config)  # what does not fit the model is said before hours have passed
    todo = [
        (task, item, missing)
        for task, own in zip(chosen, items, strict=True)
        for item in own
        if (missing := [spec for spec in specs if kept.find(kept.key(task, item, spec)) is None])
    ]
    total, done = sum(len(missing) for _, _, missing in todo), 0
    for task, item, missing in todo:
        exact = task.observe(subject, item, DynamicCache(config=model.config)) if task.needs_exact else None
        for spec in missing:
            on_progress(done, total, f"{task.label} {spec.name}")
            kept.add(kept.key(task, item, spec), _run(subject, task, item, spec, exact))
            done += 1
    on_progress(total, total, "done")
    return [
        Result(task, spec, [record for item in own if (record := kept.find(kept.key(task, item, spec)))])
        for task, own in zip(chosen, items, strict=True)
        for spec in specs
    ]


def _run(subject: Subject, task: Task, item: Item, spec: CacheSpec, exact: Any) -> Record:
    cache, start = spec.new(subject.model.config), time.perf_counter()
    try:
        seen = task.observe(subject, item, cache)
    except (ValueError, RuntimeError) as error:  # transformers' caches refuse some lengths, for one
        raise ValueError(f"cache {spec.name!r} fails on {task.label}, item {item.name}: {error}") from error
    seconds = time.perf_counter() - start
    return Record(dict(item.place), task.score(item, seen, exact), asdict(cache_bits(cache)), round(seconds, 3))


def _check_unique(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what}: got {name!r} twice; allowed: once")
