"""[`Task`]: what an evaluation asks of a model and a cache, item by item."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any, ClassVar

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from kivicache.caches import split_options
from kivicache.fidelity import cache_argument

TASKS: dict[str, type[Task]] = {}
Scores = dict[str, Any]  # name -> number, or a list of numbers, one per token


@dataclass(frozen=True)
class Subject:
    """The model under test and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Item:
    """One text to try.

    Attributes:
        name: tells the items of a task apart.
        token_ids: the tokens that the model is given.
        prefill: how many of them are prefilled at once, which a quantized cache serves exactly. What follows is read
            through the cache.
        facts: whatever else the task needs: answers, lengths, stops. Plain JSON values.
        place: where the item stands in a grid, such as {"length": 1024, "depth": 0.5}.
    """

    name: str
    token_ids: Sequence[int]
    prefill: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    place: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A name for all that decides the outcome, so that a stored result is used for the very same item alone."""
        text = json.dumps([list(self.token_ids), self.prefill, dict(self.facts)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Task(ABC):
    """A frozen dataclass whose fields are the task's options; a subclass with a name registers under it."""

    name: ClassVar[str]
    needs_exact: ClassVar[bool] = False  # whether `score` looks at what full precision gave

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is None:
            return
        if name in TASKS:
            raise ValueError(f"name: got {name!r}, which {TASKS[name].__name__} has already")
        cls.name, TASKS[name] = name, cls

    @property
    def label(self) -> str:
        """What files and tables call it."""
        return self.name

    @abstractmethod
    def items(self, subject: Subject) -> list[Item]:
        """All items, the same at each call."""

    @abstractmethod
    def observe(self, subject: Subject, item: Item, cache: Cache) -> Any:
        """Let the model work on the item with an empty cache, and return what it gave."""

    @abstractmethod
    def score(self, item: Item, seen: Any, exact: Any) -> Scores:
        """Judge what `observe` gave; ``exact`` is the same in full precision, where ``needs_exact`` asks for it."""

    def summarize(self, scores: Sequence[Scores]) -> dict[str, float]:
        """One number per metric over all items."""
        return {name: fmean(one[name] for one in scores) for name in scores[0]} if scores else {}


def parse_task(text: str) -> Task:
    """Read ``"NAME"`` or ``"NAME:FIELD=VALUE,FIELD=[VALUE,VALUE]"``, the fields being the task's own.

    Raises:
        ValueError: naming the task or its field, what was given and what is allowed.
    """
    head = re.split("[:,]", text, maxsplit=1)[0]
    if head not in TASKS:
        raise ValueError(f"task: got {head!r}; allowed: {', '.join(TASKS)}")
    allowed = [f.name for f in fields(TASKS[head])]  # type: ignore[arg-type]
    try:
        _, words, given = split_options(text)
        for name in (*words, *given):
            if name not in allowed or name in words:
                raise ValueError(f"got {name!r}; allowed: {', '.join(f'{field}=...' for field in allowed)}")
        return TASKS[head](**{name: tuple(one) if isinstance(one, list) else one for name, one in given.items()})
    except ValueError as error:
        raise ValueError(f"task {head}: {error}") from None


def check_counts(task: Task, **least: int) -> None:
    """Refuse fields that are no whole numbers of at least so many, or no lists of them where the default is one."""
    for name, allowed in least.items():
        value, several = getattr(task, name), isinstance(getattr(type(task), name), tuple)
        numbers = value if isinstance(value, tuple) else (value,)
        wrong = [one for one in numbers if type(one) is not int or one < allowed]
        if wrong or not numbers or isinstance(value, tuple) != several:
            what = "a list of whole numbers" if several else "a whole number"
            raise ValueError(f"{name}: got {value!r}; allowed: {what} from {allowed}")


@torch.no_grad()
def generate(
    subject: Subject,
    item: Item,
    cache: Cache,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    min_new_tokens: int | None = None,
) -> list[int]:
    """Prefill the item's first tokens, read the others through the cache, and continue greedily.

    Returns:
        the new tokens.
    """
    model, tokenizer = subject.model, subject.tokenizer
    input_ids = torch.tensor([list(item.token_ids)], device=model.device)
    name = cache_argument(model)
    if item.prefill:
        model(input_ids[:, : item.prefill], **{name: cache}, logits_to_keep=1)
    options: dict[str, Any] = {name: cache}
    if stop:
        options |= {"stop_strings": list(stop), "tokenizer": tokenizer}
    call: Any = model.generate
    output = call(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        num_beams=1,
        min_new_tokens=min_new_tokens,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **options,
    )
    return output[0, input_ids.shape[1] :].tolist()


def asked(
    subject: Subject, context: str, question: str, *, chat: bool = True, answer: str = ""
) -> tuple[list[int], int]:
    """Tokens of a prompt, and how many of them come before the question.

    Args:
        context: what is prefilled.
        question: what is read through the cache.
        chat: use the model's chat template, where it has one.
        answer: how the model's answer begins.
    """
    tokenizer = subject.tokenizer
    text = context + question
    if chat and tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        special = False
    else:
        special = True
    text += answer
    start = text.index(context) + len(context)
    token_ids = tokenizer(text, add_special_tokens=special).input_ids
    asked_ids = tokenizer(text[start:], add_special_tokens=False).input_ids
    return token_ids, max(len(token_ids) - len(asked_ids), 0)
