"""Backends, which choose the codes: one file each, registered by its import here."""

from kivicache.backends import hqq, mse, native, quanto
from kivicache.backends.base import Backend, LibraryBackend, available_backends, get_backend

__all__ = ["Backend", "LibraryBackend", "available_backends", "get_backend", "hqq", "mse", "native", "quanto"]
