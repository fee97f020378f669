"""Texts and rows to evaluate on: local files, or datasets by name where there is a network."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kivicache.models import MissingPackage

_ALLOWED = "a file, or OWNER/NAME[/CONFIG[/SPLIT]], a dataset on the Hugging Face hub (split: test)"


def load_text(source: str | None) -> str:
    """A file's text, or the ``text`` column of a dataset. None: the first four chapters of Alice in Wonderland.

    Raises:
        ValueError: where there is no such file or dataset.
    """
    text = _read(str(Path(__file__).with_name("alice.txt")) if source is None else source)
    if text is not None:
        return text
    rows = _from_hub(str(source))
    if not rows or "text" not in rows[0]:
        raise ValueError(f"data: got {source!r}; allowed: a dataset with a column named text")
    return "\n".join(row["text"] for row in rows)


def load_rows(source: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The first ``limit`` rows of a JSON-lines file or of a dataset.

    Raises:
        ValueError: where there is no such file or dataset, or a line of the file is no JSON object.
    """
    text = _read(source)
    if text is None:
        return _from_hub(source)[:limit]
    # JSON may hold the other characters that str.splitlines splits at
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        rows = [json.loads(line) for line in lines[:limit]]
    except ValueError as error:
        raise ValueError(f"data: {source}: allowed: one JSON object per line; {error}") from error
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"data: {source}: got {row!r:.40}; allowed: one JSON object per line")
    return rows


def _read(source: str) -> str | None:
    """The text of a file; None where there is no such file."""
    if not isinstance(source, str):
        raise ValueError(f"data: got {source!r}; allowed: {_ALLOWED}")
    try:
        return Path(source).read_text(encoding="utf-8") if Path(source).is_file() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {source}: allowed: text in UTF-8; {error}") from error


def _from_hub(source: str) -> list[dict[str, Any]]:
    owner, name, config, split, *rest = [*source.split("/"), *[""] * 3][: max(4, source.count("/") + 1)]
    if not owner or not name or rest or Path(source).suffix in (".jsonl", ".json", ".txt", ".raw"):
        raise ValueError(f"data: got {source!r}; allowed: {_ALLOWED}")
    if find_spec("datasets") is None:
        raise MissingPackage("datasets", 'pip install "kivicache[eval]"')
    import datasets

    try:
        return list(datasets.load_dataset(f"{owner}/{name}", config or None, split=split or "test"))
    except (OSError, ValueError) as error:
        raise ValueError(f"data: {source!r} cannot be loaded: {str(error).splitlines()[0]}") from error
