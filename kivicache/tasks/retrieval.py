"""Facts hidden in filler: KIVI's passkey, and needles and chains of variables in the manner of RULER (2404.06654)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from transformers import Cache

from kivicache.tasks.base import Item, Scores, Subject, Task, asked, check_counts, generate

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_WORDS = """
amber basin cedar dune ember fable grove harbor island jasper kettle lantern meadow nectar orchid pebble quartz river
saddle timber umber velvet willow yonder zephyr anchor bramble canyon dagger engine falcon garnet hammer"""


@dataclass(frozen=True)
class Needle:
    """Sentences to hide, and what is asked about them.

    Attributes:
        intro: stands before the filler.
        hidden: the sentences.
        question: stands after the filler.
        answer: how the model's answer begins.
        expected: what the answer has to contain.
        chained: whether each sentence is about the one before it, and so has to stand behind it.
    """

    intro: str
    hidden: Sequence[str]
    question: str
    answer: str
    expected: Sequence[str]
    chained: bool = False


class _Retrieval(Task):
    """Common to both: a haystack for every length, depth and sample."""

    lengths: tuple[int, ...]
    depths: int
    samples: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        check_counts(self, lengths=100, depths=1, samples=1)

    def needle(self, random: Random) -> Needle:
        raise NotImplementedError

    def items(self, subject: Subject) -> list[Item]:
        depths = [0.5] if self.depths == 1 else [i / (self.depths - 1) for i in range(self.depths)]
        return [
            self._item(subject, length, depth, sample)
            for sample in range(self.samples)
            for length in self.lengths
            for depth in depths
        ]

    def _item(self, subject: Subject, length: int, depth: float, sample: int) -> Item:
        random = Random(f"{self.label} {length} {depth} {sample}")
        needle = self.needle(random)
        line = len(subject.tokenizer(FILLER * 9, add_special_tokens=False).input_ids) / 9
        token_ids, prefill = _prompt(subject, needle, 0, [])
        count = int((length - len(token_ids)) / line)
        if count < len(needle.hidden):
            raise ValueError(f"lengths: got {length}; allowed: at least {math.ceil(len(token_ids) + 8 * line)}")
        first = round(depth * count)
        others = (
            sorted(random.choices(range(first, count + 1), k=len(needle.hidden) - 1))
            if needle.chained
            else random.sample(range(count), len(needle.hidden) - 1)
        )
        token_ids, prefill = _prompt(subject, needle, count, [first, *others])
        name = f"{length}/{depth:.3f}/{sample}"
        facts = {"answers": list(needle.expected), "max_new_tokens": self.max_new_tokens}
        return Item(name, token_ids, prefill, facts, {"length": length, "depth": round(depth, 3)})

    def observe(self, subject: Subject, item: Item, cache: Cache) -> str:
        token_ids = generate(subject, item, cache, item.facts["max_new_tokens"])
        return str(subject.tokenizer.decode(token_ids, skip_special_tokens=True))

    def score(self, item: Item, seen: str, exact: Any) -> Scores:
        answers = item.facts["answers"]
        return {"accuracy": sum(answer in seen for answer in answers) / len(answers)}


@dataclass(frozen=True)
class Passkey(_Retrieval, name="passkey"):
    """A five-digit pass key in repetitive filler, as in KIVI's own example.

    Args:
        lengths: tokens of the prompts.
        depths: how many places of the key, evenly spread from the beginning (0) to the end (1).
        samples: keys per length and depth.
    """

    lengths: tuple[int, ...] = (1024, 2048)
    depths: int = 5
    samples: int = 1
    max_new_tokens = 8

    def needle(self, random: Random) -> Needle:
        key = str(random.randint(10000, 99999))
        return Needle(
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz "
            "you about the important information there.\n",
            [f"The pass key is {key}. Remember it. {key} is the pass key.\n"],
            "What is the pass key?",
            "The pass key is",
            [key],
        )


@dataclass(frozen=True)
class Ruler(_Retrieval, name="ruler"):
    """RULER's retrieval tasks, with its words and numbers in the passkey's filler; scored by the share found.

    Args:
        kind: "single" needle; "multikey": one of four needles is asked for; "multivalue": four numbers of one key;
            "multiquery": four keys are asked for; "tracking": all names of one value along a chain of variables.
        lengths, depths, samples: as for [`Passkey`]; the depth is that of the first needle. Others lie anywhere, but
            those of a chain in their order behind it.
    """

    kind: str = "single"
    lengths: tuple[int, ...] = (1024, 2048)
    depths: int = 5
    samples: int = 1
    max_new_tokens = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in list(KINDS):
            raise ValueError(f"kind: got {self.kind!r}; allowed: {', '.join(KINDS)}")

    @property
    def label(self) -> str:
        return f"ruler-{self.kind}"

    def needle(self, random: Random) -> Needle:
        if self.kind == "tracking":
            return _tracking(random)
        keys, values, queries = KINDS[self.kind]
        names = random.sample(_WORDS.split(), keys)
        numbers = [[str(random.randint(1000000, 9999999)) for _ in range(values)] for _ in names]
        hidden = [
            f"One of the special magic numbers for {name} is: {number}.\n"
            for name, own in zip(names, numbers, strict=True)
            for number in own
        ]
        about = " and ".join(names[:queries])
        what, verb, every = ("numbers", "are", " all") if values * queries > 1 else ("number", "is", "")
        return Needle(
            "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz "
            "you about the numbers afterwards.\n",
            hidden,
            f"What {verb}{every} the special magic {what} for {about} mentioned in the provided text?",
            f"The special magic {what} for {about} mentioned in the provided text {verb}",
            [number for own in numbers[:queries] for number in own],
        )


KINDS = {"single": (1, 1, 1), "multikey": (4, 1, 1), "multivalue": (1, 4, 1), "multiquery": (4, 1, 4), "tracking": ()}


def _tracking(random: Random) -> Needle:
    names = ["".join(random.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(4)]
    value = str(random.randint(10000, 99999))
    sources = [value, *(f"VAR {name}" for name in names)]
    return Needle(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n",
        [f"VAR {name} = {source}\n" for name, source in zip(names, sources, strict=False)],
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        f"Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are "
        f"assigned the value {value}, they are:",
        names,
        chained=True,
    )


def _prompt(subject: Subject, needle: Needle, count: int, places: list[int]) -> tuple[list[int], int]:
    """The tokens with ``count`` lines of filler and the hidden sentences before the lines ``places``."""
    lines = [FILLER] * count
    order = sorted(zip(places or [0] * len(needle.hidden), needle.hidden, strict=True), key=lambda pair: pair[0])
    for place, sentence in reversed(order):
        lines.insert(place, sentence)
    return asked(subject, needle.intro + "".join(lines), needle.question, answer=needle.answer)
