"""Documents with hidden facts and training rows: what they contain, that a seed fixes them, how answers are counted."""

from __future__ import annotations

import gzip
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_megatron.facts import (
    Fact,
    Mixture,
    Target,
    count_answered,
    documents,
    load_text,
    training_batch,
)

TEXT = load_text(Path(__file__).parents[2] / "assets/text/kjv_heldout.txt")
FACT = re.compile(rb"#[A-Z]{2}[0-9]{2}")


def make(**changes):
    return documents(TEXT, **({"count": 3, "length": 256, "num_facts": 8, "num_questions": 4, "seed": 5} | changes))


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(80, 700), num_facts=st.integers(1, 16), num_questions=st.integers(1, 20), seed=st.integers(0, 99)
)
def test_a_document_is_text_with_its_facts_in_it(length, num_facts, num_questions, seed):
    (document,) = make(count=1, length=length, num_facts=num_facts, num_questions=num_questions, seed=seed)
    assert len(document.text) == length
    assert FACT.findall(document.text) == [fact.text for fact in document.facts]
    assert len({fact.key for fact in document.facts}) == num_facts
    assert FACT.sub(b"", document.text) in TEXT
    assert set(document.questions) <= set(document.facts)
    assert len(document.questions) == num_questions
    if num_questions <= num_facts:
        assert len(set(document.questions)) == num_questions


def test_the_seed_fixes_the_documents():
    assert make() == make()
    assert make(count=5)[:3] == make()
    assert make(seed=6) != make()


def test_the_documents_of_the_model_card_stay_the_same():
    """The accuracy in assets/small_moe/README.md was measured on these."""
    card = documents(TEXT, count=24, length=1024, num_facts=8, num_questions=4, seed=1008)
    digest = hashlib.sha256()
    for document in card:
        digest.update(b"".join([document.text, *(fact.text for fact in document.questions)]))
    assert digest.hexdigest() == "07076d0875d302c2d82718255f6f91174900b806ae9d20686bcf48ff0555ce8b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"num_questions": 0}, "num_questions must be at least 1, got 0"),
        ({"num_facts": 0}, "num_facts must be at least 1, got 0"),
        ({"num_facts": 677, "length": 4000}, "at most 676 .* got 677"),
        ({"num_facts": 52}, "52 facts take 260 bytes, more than length=256"),
        ({"length": 300_000}, r"text has \d+ bytes, expected at least"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_text_that_holds_a_fact_is_refused():
    with pytest.raises(ValueError, match=r"b'#AB12' at byte 300"):
        documents(b"x" * 300 + b"#AB12" + b"x" * 300, count=1, length=100, num_facts=1, num_questions=1)


@pytest.mark.parametrize(("key", "value"), [(b"ab", b"12"), (b"ABC", b"12"), (b"AB", b"1"), (b"AB", b"x2")])
def test_a_malformed_fact_is_refused(key, value):
    with pytest.raises(ValueError, match="two capitals and a value of two digits"):
        Fact(key, value)


def test_an_answer_needs_both_digits():
    made = make()
    truth = {document.prompt(fact): fact.value for document in made for fact in document.questions}

    def answering(change):
        def predict(tokens):
            result = np.zeros_like(tokens)
            for row, prompt in enumerate(tokens[:, :-1]):
                result[row, -2:] = list(change(truth[bytes(prompt.astype(np.uint8))]))
            return result

        return predict

    def other_digit(digit):
        return bytes([digit[0] + 1 if digit < b"9" else 48])

    assert count_answered(answering(lambda value: value), made, rows=5) == (12, 12)
    assert count_answered(answering(lambda value: value[:1] + other_digit(value[1:])), made) == (0, 12)
    assert count_answered(answering(lambda value: other_digit(value[:1]) + value[1:]), made) == (0, 12)


def test_answers_are_counted_over_documents_of_one_length():
    with pytest.raises(ValueError, match=r"got lengths \[256, 300\]"):
        count_answered(lambda tokens: tokens, make() + make(length=300))
    with pytest.raises(ValueError, match=r"got lengths \[\]"):
        count_answered(lambda tokens: tokens, [])
    with pytest.raises(ValueError, match=r"shape \(8,\), expected \(8, 260\)"):
        count_answered(lambda tokens: tokens[:, 0], make())


MIXTURES = {
    "copy": Mixture(copy=1.0, text=0.0, dense=0.0),
    "text": Mixture(copy=0.0, text=1.0, dense=0.0),
    "dense": Mixture(copy=0.0, text=0.0, dense=1.0),
    "few facts": Mixture(copy=0.0, text=0.0, dense=0.0),
}


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("length", [32, 50, 257, 1024])
def test_what_a_training_row_asks_for_can_be_known(kind, length):
    tokens, targets = training_batch(np.random.default_rng(3), TEXT, rows=20, length=length, mixture=MIXTURES[kind])
    assert tokens.shape == targets.shape == (20, length)
    assert tokens.dtype == targets.dtype == np.int64
    for row, target in zip(tokens, targets, strict=True):
        whole = bytes(row.astype(np.uint8))
        if kind == "text":
            assert whole in TEXT
            assert (target == Target.TEXT).all()
        elif kind == "copy":
            (asked,) = np.nonzero(target == Target.COPY)
            period = asked[0] - 3
            assert (row[asked] == row[asked - period]).all()
        else:
            answers = np.flatnonzero(target == Target.ANSWER)[::2]
            assert len(answers) > 0
            for place in answers:
                question, answer = whole[place - 3 : place], whole[place : place + 2]
                assert whole.index(question + answer) < place - 3
            assert bytes(row[target == Target.TEXT].astype(np.uint8)) in TEXT


def test_training_rows_follow_the_generator():
    one, two, other = (
        training_batch(np.random.default_rng(seed), TEXT, rows=4, length=128, mixture=Mixture())[0]
        for seed in (1, 1, 2)
    )
    assert (one == two).all()
    assert (one != other).any()


def test_bad_training_arguments_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        training_batch(rng, TEXT, rows=0, length=64, mixture=Mixture())
    with pytest.raises(ValueError, match="length must be at least 32 tokens, got 31"):
        training_batch(rng, TEXT, rows=1, length=31, mixture=Mixture())
    with pytest.raises(ValueError, match="text has 50 bytes"):
        training_batch(rng, b"x" * 50, rows=1, length=64, mixture=Mixture())
    with pytest.raises(ValueError, match=r"mixture.copy must be within \[0, 1\], got -1"):
        Mixture(copy=-1.0)
    with pytest.raises(ValueError, match="sum to at most 1"):
        Mixture(copy=0.5, text=0.5, dense=0.5)


def test_text_is_read_plain_or_compressed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"in the beginning")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"in the beginning"))
    assert load_text(tmp_path / "a.txt") == load_text(tmp_path / "a.txt.gz") == b"in the beginning"
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.txt: the file is empty"):
        load_text(tmp_path / "empty.txt")
    for content in (
        gzip.compress(b"in the beginning")[:-9],
        b"in the beginning",
        gzip.compress(b"x" * 99)[:12] + b"y" * 9,
    ):
        (tmp_path / "half.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"half\.gz: expected a whole gzip file"):
            load_text(tmp_path / "half.gz")
