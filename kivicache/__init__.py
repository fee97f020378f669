"""A KIVI key-value cache for Hugging Face transformers: keys and values in 2, 4 or 8 bits for any ``generate``."""

from kivicache.cache import KIVICache
from kivicache.config import KIVIConfig
from kivicache.memory import MemoryReport

__version__ = "0.1.0"
__all__ = ["KIVICache", "KIVIConfig", "MemoryReport", "__version__"]
