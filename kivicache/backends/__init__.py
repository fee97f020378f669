"""Backends, which choose the codes: one file each, registered by its import here."""

from kivicache.backends import native
from kivicache.backends.base import Backend, available_backends, get_backend

__all__ = ["Backend", "available_backends", "get_backend", "native"]
