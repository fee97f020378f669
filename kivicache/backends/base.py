"""The contract of a backend: it chooses codes, scale and minimum; the bytes and the attention are the same for all."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from kivicache.packing import pack
from kivicache.quantization import encode, to_metadata

_REGISTRY: dict[str, type[Backend]] = {}


class Backend(ABC):
    """Chooses the codes of a tensor of keys or values.

    A subclass names itself, ``class MyBackend(Backend, name="mine")``, and writes one method. One without a name is
    not registered: it is a base for others.
    """

    def __init_subclass__(cls, name: str | None = None, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if name in _REGISTRY:
            raise ValueError(f"backend {name!r} is already registered, by {_REGISTRY[name].__name__}")
        if name is not None:
            _REGISTRY[name] = cls

    @abstractmethod
    def quantize(self, states: Tensor, nbits: int, group_size: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (uint8, the shape of ``states``), scale and minimum (float16, one per group).

        Arguments and shapes are those of [`kivicache.quantization.quantize`]; reading back is always
        ``codes * scale + minimum``.
        """

    def quantize_pack(
        self, states: Tensor, nbits: int, group_size: int, axis: str, out: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """As [`quantize`], with the codes packed into words (see [`kivicache.packing`]).

        Args:
            states, nbits, group_size, axis: as in [`kivicache.quantization.quantize`].
            out: (words, scale, minimum) to write into.
        """
        codes, scale, minimum = self.quantize(states, nbits, group_size, axis)
        for target, result in zip(out, (pack(codes, nbits), scale, minimum), strict=True):
            target.copy_(result)

    def has_kernel(self, device: torch.device) -> bool:
        """Whether [`quantize_pack`] is one kernel there: it makes no temporaries that grow with the tokens."""
        return False


class LibraryBackend(Backend):
    """Lets a library choose each group's scale and minimum, from a plain matrix with one group per row.

    The groups are ours, so none straddles heads, tokens or channels whatever the library would group. The codes are
    the nearest ones, as they are in the libraries too, but for scale and minimum as stored in float16: the library's
    codes belong to unrounded ones, and with them an 8-bit channel far from zero has twice the error. Non-finite
    groups read back as NaN and never reach the library, where one could spoil a criterion that all groups share.
    """

    def quantize(self, states: Tensor, nbits: int, group_size: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
        fits = [self._fit_finite(groups, nbits) for groups in _groups_last(states.detach().float(), group_size, axis)]
        scale, minimum = (torch.cat(parts, dim=3) for parts in zip(*fits, strict=True))
        return encode(states, scale, minimum, nbits, group_size, axis), scale, minimum

    def _fit_finite(self, groups: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
        """float16 scale and minimum of groups along the last dimension; NaN the minimum of one that is not finite."""
        low, high = groups.aminmax(dim=-1)
        finite = (high - low).isfinite()
        rows = torch.where(finite[..., None], groups, 0.0).reshape(-1, groups.shape[-1])
        scale, minimum = (to_metadata(x.float().view(finite.shape)) for x in self.fit(rows, nbits))
        return scale, torch.where(finite, minimum, torch.nan)

    @abstractmethod
    def fit(self, rows: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
        """The library's scale and minimum, as in ``x = code * scale + minimum``.

        Args:
            rows: float32 ``[groups, width]``, all finite; width is the group size, or that of the head's last group.
            nbits: 2, 4 or 8.

        Returns:
            scale, minimum: ``[groups]`` or ``[groups, 1]``, any floating dtype.
        """


def _groups_last(states: Tensor, group_size: int, axis: str) -> list[Tensor]:
    """``states`` with each group along the last dimension, the shape before it that of scale and minimum.

    Where groups of channels do not fill the head, its last group, which is shorter, is a tensor of its own.
    """
    if axis == "channel":
        return [states.unflatten(2, (-1, group_size)).transpose(3, 4)]
    whole = states.shape[3] - states.shape[3] % group_size
    parts = [states[..., :whole].unflatten(3, (-1, group_size)), states[..., whole:].unsqueeze(3)]
    return [part for part in parts if part.shape[3] * part.shape[4]]


def import_library(module: str, extra: str, *names: str) -> Any:
    """Import what the backend ``extra`` needs: when one is made, so that ``import kivicache`` stays light.

    ``names`` are what it uses of the module: another version's may lack them.

    Raises:
        ImportError: with the command that installs it.
    """
    try:
        library = importlib.import_module(module)
        if missing := [name for name in names if not hasattr(library, name)]:
            raise ImportError(f"it has no {missing[0]}")
        return library
    except ImportError as error:
        raise ImportError(
            f'backend {extra!r} cannot import {module} ({error}); install it with: pip install "kivicache[{extra}]"'
        ) from error


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: for a name that no backend has, with those there are.
        ImportError: where the library behind it is missing, with the command that installs it.
    """
    if name not in _REGISTRY:
        raise ValueError(f"backend: got {name!r}; allowed: {', '.join(map(repr, available_backends()))}")
    return _REGISTRY[name]()


def available_backends() -> list[str]:
    """The names of the backends that are registered, whether or not their libraries are installed."""
    return sorted(_REGISTRY)
