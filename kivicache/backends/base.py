"""The contract of a backend: it chooses codes, scale and minimum; the bytes and the attention are the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

_REGISTRY: dict[str, type[Backend]] = {}


class Backend(ABC):
    """Chooses the codes of a tensor of keys or values.

    A subclass names itself, ``class MyBackend(Backend, name="mine")``, and writes one method.
    """

    def __init_subclass__(cls, name: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if name in _REGISTRY:
            raise ValueError(f"backend {name!r} is already registered, by {_REGISTRY[name].__name__}")
        _REGISTRY[name] = cls

    @abstractmethod
    def quantize(self, states: Tensor, nbits: int, group_size: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (uint8, the shape of ``states``), scale and minimum (float16, one per group).

        Arguments and shapes are those of [`kivicache.quantization.quantize`]; reading back is always
        ``codes * scale + minimum``.
        """


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: for a name that no backend has, with those there are.
    """
    if name not in _REGISTRY:
        raise ValueError(f"backend: got {name!r}; allowed: {', '.join(map(repr, available_backends()))}")
    return _REGISTRY[name]()


def available_backends() -> list[str]:
    """The names of the backends that are registered."""
    return sorted(_REGISTRY)
