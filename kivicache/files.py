"""Files that are replaced whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to write, which becomes ``path`` at the end: until it is whole, what was there before stays.

    Raises:
        FileNotFoundError: where there is no such folder.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():  # a device keeps nothing that could be lost
        yield path
        return
    if not path.parent.is_dir():  # said of the folder asked for, not of the file beside
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    fresh = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
