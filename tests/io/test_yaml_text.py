"""YAML of settings: text stays as it was written; whatever cannot be read gets a sentence with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nora_diffusion.errors import UserError
from nora_diffusion.io.yaml_text import parse_yaml, read_yaml

READ: dict[str, Any] = {
    "trigger: 007": {"trigger": "007"},
    "a: 0123": {"a": "0123"},
    "a: 12:30": {"a": "12:30"},
    "a: 0x1F": {"a": "0x1F"},
    "a: 1_000": {"a": "1_000"},
    "a: 1.10": {"a": "1.10"},
    "a: .inf": {"a": ".inf"},
    "a: 2024-01-01": {"a": "2024-01-01"},
    "a: no": {"a": "no"},
    "a: On": {"a": "On"},
    "a: =": {"a": "="},
    "a: Null": {"a": "Null"},
    "a: !!str 007": {"a": "007"},
    "[{name: 0010}, {name: y}]": [{"name": "0010"}, {"name": "y"}],
    "007: a\n7: b": {"007": "a", "7": "b"},
    "a: 'null'\nb: ''": {"a": "null", "b": ""},
    "a: null\nb: ~\nc:": {"a": None, "b": None, "c": None},
    'a: "\\ud83d\\ude00"': {"a": "😀"},
    "a: 'C:\\new'\nb: C:\\new\nc: \"C:\\\\new\"": dict.fromkeys("abc", "C:\\new"),
    "- &own {a: 1, b: 2}\n- {<<: *own, b: 3}": [{"a": "1", "b": "2"}, {"a": "1", "b": "3"}],
    "a: &x [1, 2]\nb: *x": {"a": ["1", "2"], "b": ["1", "2"]},
    "# nothing": None,
}


@pytest.mark.parametrize("text", READ)
def test_values_stay_text(text: str) -> None:
    assert parse_yaml(text, "run.yaml") == READ[text]


def test_what_is_dumped_is_read_again(tmp_path: Path) -> None:
    texts = ["007", "0123", "12:30", "no", "null", "~", "", "<<", "2024-01-01", "a: b", "# x", "😀", "café", "a\tb c"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"texts": texts, "none": None}, allow_unicode=True))
    assert read_yaml(tmp_path / "run.yaml", "config") == {"texts": texts, "none": None}


REFUSED = {
    "a: 1\nb: 2\n'a': 3": "line 3: 'a' is also in line 1: keep one of them",
    "x: 1\n- 2": "line 2 is not valid YAML",
    "- {name: a, name: b}": "line 1: 'name' is also in line 1",
    "a: 1\n\tb: 2": "line 2 is not valid YAML: a tab is not allowed here: use spaces",
    "a:\t4": "line 1 is not valid YAML: a tab is not allowed here",
    'a: 1\nb: "C:\\photos"': "line 2 is not valid YAML: in double quotes a backslash starts an escape: write paths in",
    'a: "C:\\users"': "line 1 is not valid YAML: in double quotes a backslash",
    'a: "C:\\new photos\\table"': "line 1: in double quotes a backslash starts an escape",
    'a: "D:\\_x"': "line 1: in double quotes",
    'a: "D:\\ x"': "line 1: in double quotes",
    'a: "out\\run"': "line 1: in double quotes",
    "a: b: c": "line 1 is not valid YAML: a second ': ' in this line",
    "a: 1\nb\n": "line 2 is not valid YAML: this line has no 'key: value'",
    "a: 1\nb: 'x\nc: 2\n": "line 2 is not valid YAML: the quotes are not closed",
    "a: 1\nb: [1\n": "the brackets are not closed",
    "a: *dog*": "line 1 is not valid YAML: text cannot start with *",
    "a: &dog\nb: 1": "line 1: text cannot start with &",
    "a: @dog": "text cannot start with this character",
    "a: !dog": "line 1: tags such as !dog are not supported",
    "a: !!int 0123": "tags such as !!int are not supported",
    "a: !!python/object/apply:os.system ['true']": "tags such as !!python/object/apply:os.system are not supported",
    "a: 1\n---\nb: 2": "line 2 is not valid YAML: a second document",
    "a: 1\nb: x\0": "line 2: it has the character '\\x00': remove it",
    'a: "\\ud83d"': "line 1: half of an emoji",
    "? [a]\n: 1": "line 1: a list or mapping cannot be a key",
    "[" * 5000 + "]" * 5000: "line 1: more than 8 levels of nesting",
    "{a: " * 5000: "line 1: more than 8 levels of nesting",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: *b": "line 3: *b must stand for text",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_read_gets_a_sentence_with_its_line(text: str) -> None:
    with pytest.raises(UserError, match=r"\Arun.yaml, line [^\n]+\Z") as error:
        parse_yaml(text, "run.yaml")
    assert REFUSED[text] in str(error.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot read the list"),
        ("a: é".encode("latin-1"), "save it as UTF-8"),
        (b"\xff\xfea\0", "save it as UTF-8"),
    ],
)
def test_files_that_cannot_be_read(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "subjects.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_yaml(path, "list")
    path.write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_yaml(path, "list") == {"a": "1"}
