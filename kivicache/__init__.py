"""A KIVI key-value cache for Hugging Face transformers: keys and values in 2, 4 or 8 bits for any ``generate``."""

from importlib import import_module
from typing import Any

from kivicache.cache import KIVICache
from kivicache.config import KIVIConfig
from kivicache.memory import MemoryReport

__version__ = "0.1.0"
__all__ = ["KIVICache", "KIVIConfig", "MemoryReport", "__version__", "tune"]


def __getattr__(name: str) -> Any:
    if name == "tune":  # loaded when asked for: a cache does not need the search
        return import_module("kivicache.tuning").tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
