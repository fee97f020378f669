"""LongBench (arXiv 2308.14508): its sixteen English tasks, in its file format, with its prompts and metrics."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from transformers import Cache

from kivicache.data import load_rows
from kivicache.models import MissingPackage
from kivicache.tasks.base import Item, Scores, Subject, Task, asked, check_counts, generate


@dataclass(frozen=True)
class LongBench(Task, name="longbench"):
    """One LongBench task. A row's context is prefilled; question and answer go through the cache.

    Args:
        dataset: one of its English tasks, such as "hotpotqa".
        data: its file in LongBench's format: JSON lines with context, input, answers and all_classes.
            None: from the hub.
        limit: rows to ask.
        max_length: of the prompt, in tokens; longer ones lose their middle, as in LongBench.
    """

    dataset: str = "hotpotqa"
    data: str | None = None
    limit: int = 50
    max_length: int = 3500

    def __post_init__(self) -> None:
        check_counts(self, limit=1, max_length=200)
        if self.dataset not in list(DATASETS):
            raise ValueError(f"dataset: got {self.dataset!r}; allowed: {', '.join(DATASETS)}")

    @property
    def label(self) -> str:
        return f"longbench-{self.dataset}"

    def items(self, subject: Subject) -> list[Item]:
        source = self.data or f"Xnhyacinth/LongBench/{self.dataset}/test"
        return [self._item(subject, index, row) for index, row in enumerate(load_rows(source, self.limit))]

    def _item(self, subject: Subject, index: int, row: dict[str, Any]) -> Item:
        dataset = DATASETS[self.dataset]
        row = {"input": row.get("question", ""), **row}
        for name in ("context", "answers"):
            if not row.get(name):
                raise ValueError(
                    f"data: row {index}: got {name} {row.get(name)!r}; allowed: context, input and answers"
                )
        before, after = dataset["prompt"].split("{context}")
        context, question = before + row["context"], after.replace("{input}", row["input"])
        token_ids, prefill = asked(subject, context, question, chat=dataset["chat"])
        surplus = len(token_ids) - self.max_length
        if surplus > 0:
            middle = self.max_length // 2
            token_ids = token_ids[:middle] + token_ids[middle + surplus :]
            prefill = min(prefill, max(prefill - surplus, middle))  # a short context ends before the cut
        facts = {
            "answers": list(row["answers"]),
            "classes": list(row.get("all_classes") or ()),
            "max_new_tokens": dataset["max_new_tokens"],
        }
        return Item(str(index), token_ids, prefill, facts)

    def observe(self, subject: Subject, item: Item, cache: Cache) -> str:
        token_ids = generate(subject, item, cache, item.facts["max_new_tokens"])
        answer = str(subject.tokenizer.decode(token_ids, skip_special_tokens=True))
        return answer.lstrip("\n").split("\n")[0] if DATASETS[self.dataset]["first_line"] else answer

    def score(self, item: Item, seen: str, exact: Any) -> Scores:
        name = DATASETS[self.dataset]["metric"]
        metric = METRICS[name]
        return {name: max(metric(seen, answer, item.facts["classes"]) for answer in item.facts["answers"])}


def qa_f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words in common, without case, punctuation and articles."""
    predicted, expected = _words(prediction), _words(answer)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def rouge_l(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L's F, by the library that LongBench takes it from."""
    if find_spec("rouge") is None:
        raise MissingPackage("rouge", 'pip install "kivicache[eval]"')
    from rouge import Rouge

    try:
        return float(Rouge().get_scores([prediction.strip()], [answer], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):  # an empty text, or one too long for it
        return 0.0


def classification(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """1/n where the answer is among the n classes named; a class that is part of the answer's name is no other."""
    named = [name for name in classes if name in prediction and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the prediction that are the paragraph's."""
    return count(prediction, answer.removeprefix("Paragraph "))


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the prediction that are right."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """How alike the first line without marks of a comment is, edits counted as in difflib, in whole percents."""
    # as published: a blank line counts, unless it comes first
    lines = (line for line in prediction.lstrip("\n").split("\n") if not re.search("`|#|//", line))
    return round(100 * SequenceMatcher(None, next(lines, ""), answer).ratio()) / 100


def _words(text: str) -> list[str]:
    plain = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "qa_f1": qa_f1,
    "rouge_l": rouge_l,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_similarity": code_similarity,
}
DATASETS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("longbench.yaml").read_text("utf-8"))
