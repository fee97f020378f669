"""GSM8K (arXiv 2110.14168): grade-school problems, answered in a chain of thought."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from transformers import Cache

from kivicache.data import load_rows
from kivicache.tasks.base import Item, Scores, Subject, Task, asked, check_counts, generate

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class GSM8K(Task, name="gsm8k"):
    """Exact match of the final number. The examples are prefilled; problem and answer go through the cache.

    Args:
        data: JSON lines with ``question`` and ``answer``, or a dataset.
        shots: worked examples before each problem: the first ones of the data, which are then not asked.
        limit: problems to ask.
        max_new_tokens: of each answer.
    """

    data: str = "openai/gsm8k/main/test"
    shots: int = 4
    limit: int = 100
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        check_counts(self, shots=1, limit=1, max_new_tokens=1)

    def items(self, subject: Subject) -> list[Item]:
        rows = load_rows(self.data, self.shots + self.limit)
        for index, row in enumerate(rows):
            if not {"question", "answer"} <= set(row):
                raise ValueError(f"data: {self.data}: row {index} has {sorted(row)}; allowed: question and answer")
            if final_number(row["answer"]) is None:
                raise ValueError(f"data: {self.data}: row {index} answers {row['answer']!r:.40}; allowed: a number")
        context = "".join(
            f"Question: {row['question']}\nAnswer: {_plain(row['answer'])}\n\n" for row in rows[: self.shots]
        )
        return [self._item(subject, context, index, row) for index, row in enumerate(rows[self.shots :])]

    def _item(self, subject: Subject, context: str, index: int, row: dict[str, Any]) -> Item:
        token_ids, prefill = asked(subject, context, f"Question: {row['question']}\nAnswer:", chat=False)
        facts = {"answers": [final_number(row["answer"])], "max_new_tokens": self.max_new_tokens}
        return Item(str(index), token_ids, prefill, facts)

    def observe(self, subject: Subject, item: Item, cache: Cache) -> str:
        token_ids = generate(subject, item, cache, item.facts["max_new_tokens"], stop=["Question:"])
        return str(subject.tokenizer.decode(token_ids, skip_special_tokens=True)).split("Question:")[0]

    def score(self, item: Item, seen: str, exact: Any) -> Scores:
        return {"exact_match": float(final_number(seen) == item.facts["answers"][0])}


def final_number(answer: str) -> str | None:
    """The number behind ``####``, or else the last one, without commas and decimals' last zeros; None: no number."""
    marked = re.search(r"####\s*\$?(.*)", answer)
    numbers = _NUMBER.findall(marked[1] if marked else answer)
    if not numbers:
        return None
    number = numbers[0 if marked else -1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def _plain(answer: str) -> str:
    """A worked answer without GSM8K's <<calculator marks>>."""
    return re.sub(r"<<.*?>>", "", answer)
