"""Results files: what is written is read again, and anything else is refused in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from result_files import example

from nora_diffusion import UserError
from nora_diffusion.results.files import read_results, write_results
from nora_diffusion.results.machine import command_text, this_machine

Change = Callable[[dict[str, Any]], object]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    results = example()
    failed = replace(
        results.rows[-1], seed=7, scores={"heldout_loss": math.inf, "subject_score": 0.0}, error="diverged"
    )
    results.rows.append(failed)
    file = write_results(results, tmp_path / "a.json")
    assert read_results(file) == results
    text = file.read_text()
    assert '"heldout_loss": null' in text and "Infinity" not in text
    assert len(text.splitlines()) - len(results.rows) < 80  # a row is a line


def test_a_score_that_is_not_a_number_counts_as_infinite(tmp_path: Path) -> None:
    results = example()
    results.rows[0].scores["heldout_loss"] = math.nan
    with pytest.raises(UserError, match="row 1 whose heldout_loss is not a number"):
        write_results(results, tmp_path / "a.json")
    results.rows[0].scores.update(heldout_loss=math.inf, subject_score=math.inf)
    with pytest.raises(UserError, match="row 1 whose subject_score is not a number"):
        write_results(results, tmp_path / "a.json")
    assert not [*tmp_path.iterdir()]


def test_numbers_that_no_reader_accepts_are_not_written(tmp_path: Path) -> None:
    for values in ({"seconds": math.inf}, {"seconds": 1e300}, {"rate": math.nan}, {"bytes": 10**30}):
        results = example()
        results.rows[0] = replace(results.rows[0], **values)
        with pytest.raises(UserError, match=r"a.json would be invalid"):
            write_results(results, tmp_path / "a.json")
    assert not [*tmp_path.iterdir()]


def test_names_of_odd_folders_can_be_read_again(tmp_path: Path) -> None:
    odd = "caf\udce9 \x1b[2J\n" + "x" * 3000
    rows = [replace(row, subject=odd) for row in example().rows[:1]]
    results = replace(example(rows), data={"six": {odd: {}}}, name=odd, command=odd)
    found = read_results(write_results(results, tmp_path / "a.json"))
    assert found.rows[0].subject in found.data["six"] and found.name.startswith("caf [2J")


WRONG: dict[str, tuple[Change, str]] = {
    "another format": (lambda d: d.update(format="x"), 'no "format": "nora_diffusion.results"'),
    "a later version": (lambda d: d.update(version=99), "version 99, and this release reads up to 1: upgrade"),
    "no version": (lambda d: d.pop("version"), "its version is None"),
    "an unknown key": (lambda d: d.update(extra=1), "unknown key 'extra'"),
    "a missing key": (lambda d: d.pop("judges"), "no 'judges'"),
    "a missing key of a row": (lambda d: d["rows"][1].pop("steps"), "rows, item 2 has no 'steps'"),
    "an unknown key of a row": (lambda d: d["rows"][0].update(host="a"), "rows, item 1 has the unknown key 'host'"),
    "a row that is none": (lambda d: d["rows"].append(3), "rows, item 5 is not an object"),
    "a number as text": (lambda d: d["rows"][0].update(seed="0"), "rows, item 1, seed has an invalid value"),
    "a huge number": (lambda d: d["rows"][0].update(bytes=10**30), "rows, item 1, bytes has an invalid value"),
    "a negative number": (lambda d: d["rows"][0].update(seconds=-1), "row 1 with seconds below 0"),
    "a rate of 0": (lambda d: d["rows"][1].update(rate=0), "row 2 with the learning rate 0"),
    "a rate that no plot shows": (lambda d: d["rows"][1].update(rate=5e-324), "the learning rate 4.94066e-324"),
    "a date in other digits": (lambda d: d.update(date="\u0662026-11-30"), "has the date"),
    "too many methods": (lambda d: d["methods"].update({f"m{n}": {} for n in range(1000)}), "has 1,002 methods"),
    "too many subjects": (lambda d: d["data"]["six"].update({f"s{n}": {} for n in range(1000)}), "has 1,002 subjects"),
    "too many scores": (lambda d: d["scores"].update({f"s{n}": "lower" for n in range(100)}), "has 102 scores"),
    "too many tasks": (lambda d: d["data"].update({f"t{n}": {} for n in range(100)}), "has 101 tasks"),
    "too many lengths": (
        lambda d: d["rows"].extend([d["rows"][1] | {"steps": n} for n in range(200, 300)]), "has 101 numbers of steps"
    ),
    "no hash": (lambda d: d["base"].update(fingerprint="abc"), "for the base no hash"),
    "no hash of images": (
        lambda d: d["data"]["six"]["cat"]["training"].update(sha256="<script>"), "for 'cat', training no hash"
    ),
    "an unknown method": (lambda d: d["rows"][0].update(method="magic"), "row 1 of the method 'magic'"),
    "an unknown subject": (lambda d: d["rows"][0].update(subject="cow"), "row 1 of the subject 'cow' in the task"),
    "an unknown score": (lambda d: d["rows"][0]["scores"].update(x=1), "row 1 with the score 'x'"),
    "an infinite score": (lambda d: d["rows"][0]["scores"].update(subject_score=None), "whose subject_score is not"),
    "no direction": (lambda d: d["scores"].update(subject_score="up"), "scores, 'subject_score' has an invalid value"),
    "a row twice": (lambda d: d["rows"].append(d["rows"][0]), "row 5 that repeats an earlier one"),
    "no rows": (lambda d: d.update(rows=[]), "has no rows"),
    "a wrong date": (lambda d: d.update(date="yesterday"), "the date 'yesterday'"),
    "no protocol": (lambda d: d["protocol"].pop("name"), "does not name its protocol"),
    "a list as a name": (lambda d: d.update(name=[1]), "name has an invalid value"),
    "odd characters": (lambda d: d["methods"].update({"\x1b[2J": {}}), "not a plain name"),
    "nested settings": (
        lambda d: d["methods"].update(nora=json.loads('{"a":' * 20 + "1" + "}" * 20)), "nested too deeply"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused(name: str, tmp_path: Path) -> None:
    change, message = WRONG[name]
    file = write_results(example(), tmp_path / "a.json")
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    with pytest.raises(UserError) as caught:
        read_results(file)
    assert message in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a valid results file"),
        (b"\xff\xfe", "not a valid results file"),
        (b"[" * 100_000, "not a valid results file"),
        (b"{" + b'"a":[' * 2_000_000, "not a valid results file"),
        (b'{"format": NaN}', "NaN is not a number"),
        (b'{"format": 1, "format": 2}', "a key occurs twice"),
        (b" " * (1 << 24) + b"{}", "larger than 16 MiB"),
    ],
    ids=range(7),
)
def test_hostile_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_results(file)
    with pytest.raises(UserError, match="there is no results file"):
        read_results(tmp_path)


def test_a_command_is_written_without_folders() -> None:
    words = ["--out", "/home/somebody/study", "nora=/data/{subject}-nora:0.5", "examples/subjects/cat", "~/x", "a b"]
    words.append(r"C:\Users\somebody\study")
    text = command_text("nora-diffusion evaluate", words)
    assert text == "nora-diffusion evaluate --out study 'nora={subject}-nora:0.5' examples/subjects/cat x 'a b' study"


def test_the_machine_is_described_without_its_name() -> None:
    machine = this_machine()
    assert machine.cores >= 1 and machine.processor and machine.seconds == "cpu"
    assert {*vars(machine)} == {"processor", "cores", "accelerator", "seconds"}
