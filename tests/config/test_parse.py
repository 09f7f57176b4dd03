"""Files that anyone may have written: YAML by the core schema, and what is refused in one line that names the file."""

from __future__ import annotations

import itertools

import pytest
import yaml

from pikv_megatron import ConfigError
from pikv_megatron.config import load, load_deepspeed
from pikv_megatron.config.parse import parse_yaml, read_json, read_yaml, to_yaml

LEVELS = [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(9)]
BOMB = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *LEVELS, "runtime: {window: *a9}"])
MERGES = [f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 10)}]}}" for i in range(9)]
CHAIN = "\n".join(["a0: &a0 []", *(f"a{i + 1}: &a{i + 1} [*a{i}]" for i in range(500)), "? *a500\n: 1"])
BAD_YAML = {
    "more bytes than a configuration has": (b"# " + b"x" * (1 << 18), "expected a file of at most 262,144 bytes"),
    "aliases of aliases": (
        BOMB.encode(),
        "line 5, column 5: expected at most 50000 keys and values, aliases written out",
    ),
    "merges of merges": ("\n".join(["a0: &a0 {x: 1}", *MERGES]).encode(), "expected at most 50000 keys and values"),
    "a chain of aliases": (CHAIN.encode(), "expected at most 24 levels, aliases written out"),
    "an alias of itself": (b"runtime: &a {window: *a}", "line 1, column 22: expected no alias within what it stands"),
    "deep nesting": (b"runtime: " + b"[" * 10_000, "line 1, column 33: expected at most 24 levels"),
    "deep nesting by indents": (b"\n".join(b" " * i + b"a:" for i in range(400)), "expected at most 24 levels"),
    "not UTF-8": (b"runtime: {window: \xff}", "expected UTF-8 text: 'utf-8' codec can't decode byte 0xff in position"),
    "control characters": (b"runtime: \x00", "not YAML: unacceptable character #x0000"),
    "not closed": (b"runtime:\n  tiers: [{kind: device\n", "not YAML: line 3, column 1: while parsing a flow mapping"),
    "a key twice": (
        b"runtime:\n  window: 8\n  sinks: 4\n  window: 16\n",
        "not YAML: line 4, column 3: the key 'window' stands twice, first in line 2",
    ),
    "a list for a key": (b"{[1, 2]: 3}", "not YAML: line 1, column 2: while constructing a mapping, found unhashable"),
    "an object of Python": (b"!!python/object:os.system {}", "could not determine a constructor for the tag"),
    "an integer of many digits": (b"runtime: {window: 1%s}" % (b"0" * 5000), "not YAML: Exceeds the limit"),
    "a list": (b"[1]", "expected a mapping of keys, got list"),
    "nothing": (b"", "expected a mapping of keys, got NoneType"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_is_refused_in_one_line(name, tmp_path):
    content, said = BAD_YAML[name]
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and said in message
    assert "\n" not in message and len(message) < 400


def test_an_endless_file_is_read_to_the_bound():
    with pytest.raises(ConfigError, match="/dev/zero: expected a file of at most"):
        load("/dev/zero")


def test_values_in_messages_are_clipped():
    nested = ["x" * 10**6]
    for _ in range(9):
        nested = [nested] * 10
    for whole in (
        {"runtime": {"window": nested}},
        {"runtime": nested},
        {"runtime": {"x" * 10**6: 1}},
        {"x" * 10**6: 1},
    ):
        with pytest.raises(ConfigError, match=r"^(runtime|'x)") as error:
            load(whole)
        assert len(str(error.value)) < 400


NUMBERS = {
    "1e9": 10**9,
    "1.5e+3": 1500.0,
    "1e-3": 0.001,
    ".5": 0.5,
    "65_536": 65536,
    "-7": -7,
    "0x10": 16,
    "0o17": 15,
    "yes": "yes",
    "off": "off",
    "true": True,
    "null": None,
    "": None,
    "1:30": "1:30",
    "010": "010",
    "2024-01-01": "2024-01-01",
    ".inf": float("inf"),
    "1.2.3": "1.2.3",
}


@pytest.mark.parametrize("text", NUMBERS)
def test_scalars_are_those_of_the_core_schema(text):
    assert parse_yaml(f"[{text or '~'}]", "here") == [NUMBERS[text]]


@pytest.mark.parametrize("written", ["1e9", "1_000_000_000", "1.0e9", "1000000000.0"])
def test_an_integer_however_it_is_written(written, tmp_path):
    (tmp_path / "a.yaml").write_text(f"runtime: {{max_tokens: {written}, attention: {{epsilon: 1e-3}}}}")
    _, runtime = load(tmp_path / "a.yaml")
    assert (runtime.max_tokens, runtime.attention.epsilon) == (10**9, 0.001)
    assert isinstance(runtime.max_tokens, int)


@pytest.mark.parametrize("written", ["yes", "on", "1:30", "010"])
def test_text_for_an_integer_is_shown_as_it_was_written(written, tmp_path):
    (tmp_path / "a.yaml").write_text(f"runtime: {{window: {written}}}")
    with pytest.raises(ConfigError, match=rf"^runtime\.window: expected int, got '{written}'"):
        load(tmp_path / "a.yaml")


def test_anchors_and_merges_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [*a, *a]\n")
    both = {"x": 1, "y": 2}
    assert read_yaml(tmp_path / "a.yaml") == {"a": both, "b": {"x": 3, "y": 2}, "c": [both, both]}


def test_what_is_written_is_read_back_by_either_schema():
    texts = ["1e9", "1e-3", "yes", "off", "1:30", "010", "0o17", "2024-01-01", "null", "<<", "plain", ""]
    values = [*texts, 1, 1e-6, 1e9, 1e300, True, None, float("inf")]
    text = to_yaml({"values": values})
    assert parse_yaml(text, "here") == yaml.safe_load(text) == {"values": values}


BAD_JSON = {
    "not JSON": (b"{'a': 1}", "not JSON: Expecting property name"),
    "not UTF-8": (b'{"a": "\xff"}', "expected UTF-8 text"),
    "deep nesting": (b"[" * 10**6, "not JSON that can be read: nested too deeply"),
    "a list": (b"[1]", "expected a JSON object, got list"),
    "a number": (b"5", "expected a JSON object, got int"),
    "an integer of many digits": (b'{"a": 1%s}' % (b"0" * 5000), "not JSON: Exceeds the limit"),
}


@pytest.mark.parametrize(("name", "read"), list(itertools.product(BAD_JSON, (load_deepspeed, read_json))))
def test_bad_json_is_refused_in_one_line(name, read, tmp_path):
    content, said = BAD_JSON[name]
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: {said}") and "\n" not in str(error.value)
