"""A task's accuracy as a loss: questions whose answers are numbers, GSM8K's for one, answered through the cache."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kivicache.cache import KIVICache
from kivicache.config import KIVIConfig
from kivicache.models import encode

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Question:
    text: str
    answer: float


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The first ``limit`` questions of a file with one JSON object ``{"question", "answer"}`` per line.

    The last number of the answer is the one that counts, as in GSM8K's ``#### 42``.

    Raises:
        ValueError: naming the line that is no such thing.
    """
    questions = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()[:limit], 1):
        try:
            record = json.loads(line)
            questions.append(Question(record["question"], last_number(record["answer"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}: line {number}: got {line[:60]!r}; allowed: {{"question": text, "answer": text with '
                "a number}"
            ) from error
    if not questions:
        raise ValueError(f"{path}: got no questions; allowed: at least one line")
    return questions


def last_number(text: str) -> float:
    """The last number in ``text``.

    Raises:
        ValueError: where there is none.
    """
    found = _NUMBER.findall(text)
    if not found:
        raise ValueError(f"text: got {text[:60]!r}; allowed: text with a number")
    return float(found[-1].replace(",", ""))


class TaskErrors:
    """A config's loss: the fraction of questions that the model, answering greedily, gets wrong."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        max_new_tokens: int = 256,
    ):
        self.model, self.tokenizer, self.questions = model, tokenizer, questions
        self.max_new_tokens = max_new_tokens

    def __call__(self, config: KIVIConfig) -> float:
        return sum(not self._is_right(question, config) for question in self.questions) / len(self.questions)

    def _is_right(self, question: Question, config: KIVIConfig) -> bool:
        inputs = encode(self.tokenizer, question.text).to(self.model.device)
        cache = KIVICache(config, config=self.model.config)
        generate: Any = self.model.generate
        output = generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=self.max_new_tokens)
        answer = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        try:
            return last_number(str(answer)) == question.answer
        except ValueError:
            return False
