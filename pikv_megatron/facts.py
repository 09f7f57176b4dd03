"""Text with hidden facts, to measure whether a model still finds them in its cache; and rows of such text to
train on.

A fact is five bytes, `#QX47`: a mark, a key of two upper-case letters, a value of two digits. A document is
running text with facts scattered in it; the question is `#QX`, the answer `47` (chance: 1 %). Tokens are
bytes. Everything follows from a seed. Nothing here knows of a model, a cache or torch.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MARK = b"#"
FACT_LENGTH = 5
MAX_FACTS = 26 * 26  # distinct keys

Tokens = NDArray[np.int64]

_FACT_IN_TEXT = re.compile(rb"#[A-Z]{2}[0-9]{2}")
_COPY_ALPHABET = np.frombuffer(b"#ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", dtype=np.uint8)
_SHORTEST_COPY = 10
_COPY_LEAD = 3  # bytes of the second copy before the next one can be known


@dataclass(frozen=True)
class Fact:
    """One hidden fact. key: two upper-case letters; value: two digits."""

    key: bytes
    value: bytes

    def __post_init__(self) -> None:
        if not _FACT_IN_TEXT.fullmatch(MARK + self.key + self.value):
            raise ValueError(
                f"a fact has a key of two capitals and a value of two digits, got {self.key!r} and {self.value!r}"
            )

    @property
    def text(self) -> bytes:
        return MARK + self.key + self.value

    @property
    def question(self) -> bytes:
        return MARK + self.key


@dataclass(frozen=True)
class Document:
    """A text, the facts hidden in it in order of position, and the ones that are asked about."""

    text: bytes
    facts: tuple[Fact, ...]
    questions: tuple[Fact, ...]

    def prompt(self, fact: Fact) -> bytes:
        """The text followed by the question about `fact`; the right continuation is `fact.value`."""
        return self.text + fact.question


class Target(IntEnum):
    """What predicting a token of a training row counts as."""

    NONE = 0  # cannot be known: not in the loss
    TEXT = 1
    ANSWER = 2
    COPY = 3


@dataclass(frozen=True)
class Mixture:
    """Shares of the kinds of training rows: repeats, text, text full of facts; the rest has few facts."""

    copy: float = 0.1
    text: float = 0.2
    dense: float = 0.2

    def __post_init__(self) -> None:
        for name, share in (("copy", self.copy), ("text", self.text), ("dense", self.dense)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"mixture.{name} must be within [0, 1], got {share}")
        if self.copy + self.text + self.dense > 1.0 + 1e-9:
            raise ValueError(f"the shares of a mixture must sum to at most 1, got {self}")


def load_text(path: str | Path) -> bytes:
    """The bytes of a text file, or of a gzip'ed one where the name ends in .gz.

    Raises:
        ValueError: the file is empty, or not a whole gzip file.
    """
    path = Path(path)
    text = path.read_bytes()
    if path.suffix == ".gz":
        try:
            text = gzip.decompress(text)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file: {error}") from error
    if not text:
        raise ValueError(f"{path}: the file is empty, expected text")
    return text


def documents(
    text: bytes, *, count: int, length: int, num_facts: int, num_questions: int, seed: int = 0
) -> list[Document]:
    """Documents of exactly `length` bytes cut from `text`, each with `num_facts` facts at random places.

    The first n documents of a seed are the same for every `count`. Questions are drawn from a document's
    facts, without repetition where there are enough.

    Raises:
        ValueError: a count below 1, more facts than keys or than fit, a text that is too short or that holds
            a fact already.
    """
    _check_count("count", count)
    _check_count("num_questions", num_questions)
    _check_facts(num_facts, length)
    _check_text(text, length - FACT_LENGTH * num_facts)
    rng = np.random.default_rng(seed)
    source = np.frombuffer(text, dtype=np.uint8)
    made = []
    for _ in range(count):
        facts = _draw_facts(rng, num_facts)
        tokens, _ = _hide(rng, source, facts, length)
        asked = rng.choice(num_facts, size=num_questions, replace=num_facts < num_questions)
        made.append(Document(bytes(tokens.astype(np.uint8)), facts, tuple(facts[i] for i in asked)))
    return made


def count_answered(
    predict: Callable[[Tokens], Tokens], documents: Sequence[Document], *, rows: int = 8
) -> tuple[int, int]:
    """Asks a model every question of the documents; both digits must be its greedy choice.

    The model reads the prompt and the first digit of the answer at once: where it would choose another first
    digit the answer is wrong whatever follows, so this equals generating two tokens.

    Args:
        predict: from token ids [rows, length] to the model's greedy next token after each of them, the same
            shape.
        documents: all of one length.
        rows: prompts per call of `predict`.

    Returns:
        Questions answered right, questions asked.

    Raises:
        ValueError: no documents, documents of several lengths, `rows` below 1, or a result of another shape.
    """
    _check_count("rows", rows)
    lengths = {len(document.text) for document in documents}
    if len(lengths) != 1:
        raise ValueError(f"documents must be at least one, and of one length; got lengths {sorted(lengths)}")
    asked = [
        (document.prompt(fact) + fact.value[:1], fact.value) for document in documents for fact in document.questions
    ]
    right = 0
    for start in range(0, len(asked), rows):
        batch = asked[start : start + rows]
        tokens = np.array([list(prompt) for prompt, _ in batch], dtype=np.int64)
        predicted = predict(tokens)
        if predicted.shape != tokens.shape:
            raise ValueError(f"predict returned shape {predicted.shape}, expected {tokens.shape}")
        right += sum(row[-2:].tolist() == list(value) for row, (_, value) in zip(predicted, batch, strict=True))
    return right, len(asked)


def training_batch(
    rng: np.random.Generator, text: bytes, *, rows: int, length: int, mixture: Mixture
) -> tuple[Tokens, Tokens]:
    """Random training rows. Returns tokens and targets, both int64 [rows, length]; `targets` holds a Target
    for each token.

    Raises:
        ValueError: `rows` below 1, `length` below 32, or a text that is too short.
    """
    _check_count("rows", rows)
    if length < 32:
        raise ValueError(f"length must be at least 32 tokens, got {length}")
    _check_text(text, length)
    source = np.frombuffer(text, dtype=np.uint8)
    pairs = [_training_row(rng, source, length, mixture) for _ in range(rows)]
    return np.stack([tokens for tokens, _ in pairs]), np.stack([targets for _, targets in pairs])


def _training_row(
    rng: np.random.Generator, source: NDArray[np.uint8], length: int, mixture: Mixture
) -> tuple[Tokens, Tokens]:
    kind = rng.random()
    if kind < mixture.copy:
        return _copy_row(rng, length)
    if kind < mixture.copy + mixture.text:
        start = rng.integers(0, len(source) - length + 1)
        return source[start : start + length].astype(np.int64), np.full(length, Target.TEXT, dtype=np.int64)
    if kind < mixture.copy + mixture.text + mixture.dense:  # nothing but facts and questions, or nearly so
        most = min(length // (2 * FACT_LENGTH), MAX_FACTS)
        num_facts = int(rng.integers(max(1, most // 2), most + 1))
        return _retrieval_row(rng, source, length, num_facts, num_facts)
    num_facts = int(np.exp(rng.uniform(0.0, np.log(min(length // 16, MAX_FACTS)))))
    return _retrieval_row(rng, source, length, num_facts, min(num_facts, length // 20))


def _retrieval_row(
    rng: np.random.Generator, source: NDArray[np.uint8], length: int, num_facts: int, num_questions: int
) -> tuple[Tokens, Tokens]:
    """A document, then questions about it with their answers."""
    facts = _draw_facts(rng, num_facts)
    asked = rng.permutation(num_facts)[:num_questions]
    context, targets = _hide(rng, source, facts, length - FACT_LENGTH * num_questions)
    questions = np.frombuffer(b"".join(facts[i].text for i in asked), dtype=np.uint8)
    per_question = [Target.NONE, Target.NONE, Target.NONE, Target.ANSWER, Target.ANSWER]
    return (
        np.concatenate([context, questions.astype(np.int64)]),
        np.concatenate([targets, np.array(per_question * num_questions, dtype=np.int64)]),
    )


def _copy_row(rng: np.random.Generator, length: int) -> tuple[Tokens, Tokens]:
    """One random segment again and again: what teaches a model to look back."""
    period = int(np.exp(rng.uniform(np.log(_SHORTEST_COPY), np.log(length // 2))))
    segment = rng.integers(33, 127, size=period) if rng.random() < 0.4 else rng.choice(_COPY_ALPHABET, size=period)
    targets = np.full(length, Target.NONE, dtype=np.int64)
    targets[period + _COPY_LEAD :] = Target.COPY
    return np.resize(segment, length).astype(np.int64), targets


def _draw_facts(rng: np.random.Generator, num_facts: int) -> tuple[Fact, ...]:
    keys = rng.choice(MAX_FACTS, size=num_facts, replace=False).tolist()
    values = rng.integers(0, 100, size=num_facts).tolist()
    return tuple(
        Fact(bytes([65 + key // 26, 65 + key % 26]), b"%02d" % value) for key, value in zip(keys, values, strict=True)
    )


def _hide(
    rng: np.random.Generator, source: NDArray[np.uint8], facts: Sequence[Fact], length: int
) -> tuple[Tokens, Tokens]:
    """Text of `length` bytes with `facts` in it, in order, and each byte's target: int64 [length] both."""
    passage_length = length - FACT_LENGTH * len(facts)
    start = rng.integers(0, len(source) - passage_length - 1)
    passage = source[start : start + passage_length]
    cuts = np.sort(rng.integers(0, passage_length + 1, size=len(facts)))
    places = (cuts[:, None] + np.arange(len(facts))[:, None] * FACT_LENGTH + np.arange(FACT_LENGTH)).reshape(-1)
    targets = np.full(length, Target.TEXT, dtype=np.int64)
    targets[places] = Target.NONE
    tokens = np.empty(length, dtype=np.int64)
    tokens[places] = np.frombuffer(b"".join(fact.text for fact in facts), dtype=np.uint8)
    tokens[targets == Target.TEXT] = passage
    return tokens, targets


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_facts(num_facts: int, length: int) -> None:
    _check_count("num_facts", num_facts)
    if num_facts > MAX_FACTS:
        raise ValueError(f"num_facts must be at most {MAX_FACTS} (there are no more keys), got {num_facts}")
    if num_facts * FACT_LENGTH > length:
        raise ValueError(f"{num_facts} facts take {num_facts * FACT_LENGTH} bytes, more than length={length}")


def _check_text(text: bytes, needed: int) -> None:
    if len(text) < needed + 2:
        raise ValueError(f"text has {len(text)} bytes, expected at least {needed + 2}")
    found = _FACT_IN_TEXT.search(text)
    if found:
        raise ValueError(f"text holds a fact already, {found.group()!r} at byte {found.start()}; expected none")
