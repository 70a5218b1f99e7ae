"""Captions of images: which file or row belongs to which image, and findings about those that belong to none."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from factories import write_photos

from nora_diffusion.data import find_images
from nora_diffusion.data.caption_files import Captions, read_captions
from nora_diffusion.errors import UserError


def folder_of(path: Path, *names: str) -> Path:
    """A folder of photos with these names; the bytes are not read."""
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_bytes(b"\xff\xd8\xff")
    return path


def write_rows(folder: Path, *rows: tuple[str, str], column: str = "text") -> None:
    lines = [json.dumps({"file_name": name, column: text}) for name, text in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def read(folder: Path, prompt: str | None = "plain", column: str | None = None) -> Captions:
    return read_captions(find_images(folder), prompt, column is None, column)


def test_captions_come_from_text_files_metadata_or_the_prompt(tmp_path: Path) -> None:
    paths = find_images(write_photos(tmp_path, 2))
    assert read_captions(paths, "a photo of sks dog") == Captions(["a photo of sks dog"] * 2)
    (tmp_path / "0.txt").write_text("a sks dog\n in snow\n")
    assert read(tmp_path).texts == ["a sks dog in snow", "plain"]
    with pytest.raises(UserError, match=r"1 of 2 photos have no caption \(1.png\): add a text file such as 1.txt, or"):
        read(tmp_path, None)
    write_rows(tmp_path, ("0.png", "one"), ("1.png", "two"))
    assert read(tmp_path, None, "text") == Captions(["one", "two"])
    assert read(tmp_path, None) == Captions(["a sks dog in snow", "two"])
    with pytest.raises(UserError, match="has no text under 'caption'; its keys are text"):
        read(tmp_path, None, "caption")
    with pytest.raises(UserError, match="there is no prompt"):
        read_captions(paths, None)


@pytest.mark.parametrize(
    ("photo", "file"),
    [
        ("0.jpg", "0.txt"), ("0.jpg", "0.TXT"), ("0.jpg", "0.Txt"), ("0.JPG", "0.txt"), ("A.jpg", "a.txt"),
        ("0.jpg", "0.caption"), ("0.jpg", "0.CAPTION"), ("0.jpg", "0.jpg.txt"), ("0.jpg", "0.JPG.txt"),
        ("0.jpg", "0.jpg.caption"), ("a.b.jpg", "a.b.txt"), ("my dog (1).jpg", "my dog (1).txt"),
        (unicodedata.normalize("NFD", "café.jpg"), "café.txt"), ("Über.jpg", unicodedata.normalize("NFD", "über.TXT")),
        ("bare", "bare.txt"),
    ],
)  # fmt: skip
def test_a_caption_file_is_found_by_its_name(photo: str, file: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, photo, "other.jpg")
    (folder / file).write_text("\ufeffown\r\n caption", encoding="utf-8")
    (folder / "other.txt").write_text("other")
    found = dict(zip([path.name for path in find_images(folder)], read(folder, None).texts, strict=True))
    assert found == {photo: "own caption", "other.jpg": "other"} and read(folder, None).findings == ()


@pytest.mark.parametrize(
    ("photo", "name"),
    [
        ("0.jpg", "0.jpg"), ("0.jpg", "0.JPG"), ("0.jpg", "./0.jpg"), ("0.jpg", "train\\0.jpg"),
        ("0.jpg", "train/0.jpg"),
        ("0.jpg", "C:\\photos\\dog\\0.jpg"), ("0.jpg", "/data/set/0.jpg"), ("0.jpg", "../set/0.Jpg"),
        (unicodedata.normalize("NFD", "café.jpg"), "café.jpg"), ("CAFÉ.JPG", unicodedata.normalize("NFD", "café.jpg")),
    ],
)  # fmt: skip
def test_a_row_is_found_by_its_name(photo: str, name: str, tmp_path: Path) -> None:
    write_rows(folder_of(tmp_path, photo), (name, "own"))
    assert read(tmp_path, None) == read(tmp_path, None, "text") == Captions(["own"])


def test_a_row_that_names_the_path_wins(tmp_path: Path) -> None:
    """As in a list for several folders: the rows of another folder's photos are not used."""
    folder = folder_of(tmp_path / "day2", "0.jpg", "1.jpg")
    write_rows(folder, *((f"day{day}/{n}.jpg", f"day {day}, {n}") for day in (1, 2) for n in (0, 1)))
    found = read(folder)
    assert found.texts == ["day 2, 0", "day 2, 1"]
    assert found.findings == (
        "2 of 4 rows of metadata.jsonl name no photo of this folder (day1/0.jpg, day1/1.jpg): correct file_name, or "
        "remove them.",
    )
    folder_of(tmp_path / "day2" / "sub", "1.jpg")
    write_rows(folder, ("0.JPG", "case"), ("0.jpg", "exact"), ("sub/1.jpg", "below"))
    assert read(folder).texts == ["exact", "plain"]
    assert "2 of 3 rows of metadata.jsonl name no photo of this folder (0.JPG, sub/1.jpg)" in read(folder).findings[1]


@pytest.mark.parametrize("names", [("day1/0.jpg", "day2/0.jpg"), ("0.jpg", "0.jpg"), ("a\\0.JPG", "b/0.JPG")])
def test_contradicting_rows_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    folder_of(tmp_path, "0.jpg", "1.jpg")
    write_rows(tmp_path, (names[0], "grass"), ("1.jpg", "x"), (names[1], "snow"))
    with pytest.raises(UserError, match=r"metadata.jsonl, lines 1 and 3 have different captions for 0.jpg \("):
        read(tmp_path)
    write_rows(tmp_path, (names[0], "grass"), ("1.jpg", "x"), (names[1], "grass"))
    assert read(tmp_path) == Captions(["grass", "x"])


def test_a_row_for_two_photos_is_not_used(tmp_path: Path) -> None:
    write_rows(folder_of(tmp_path, "a.jpg", "A.jpg", "b.jpg"), ("A.JPG", "which"), ("b.jpg", "b"))
    if len(find_images(tmp_path)) < 3:
        pytest.skip("this file system ignores case")
    assert read(tmp_path).texts == ["plain", "plain", "b"] and "(A.JPG)" in read(tmp_path).findings[1]


def test_an_exact_name_comes_first(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")] + ["a", "A"]
    folder = folder_of(tmp_path, *(f"{name}.jpg" for name in names))
    if len(find_images(folder)) < 4:
        pytest.skip("this file system ignores case or Unicode forms")
    write_rows(folder, *((f"{name}.jpg", name) for name in names))
    assert read(folder, None) == Captions([path.stem for path in find_images(folder)])
    for name in names:
        (folder / f"{name}.txt").write_text(f"text {name}")
    assert read(folder, None) == Captions([f"text {path.stem}" for path in find_images(folder)])


def test_captions_of_photos_that_are_not_trained_stay_theirs(tmp_path: Path) -> None:
    """Held-out and unreadable photos have captions too."""
    folder = folder_of(tmp_path, "0.jpg", "a.jpg")
    for name in ("0.txt", "A.txt", "a.txt"):
        (folder / name).write_text(name)
    write_rows(folder, ("0.jpg", "row 0"), ("a.jpg", "row a"))
    assert read_captions([folder / "0.jpg"], None, sidecars=True) == Captions(["0.txt"])
    assert read_captions([folder / "0.jpg"], None, column="text") == Captions(["row 0"])


def test_lost_captions_are_counted_and_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, *(f"{n}.jpg" for n in range(6)))
    for name in ("0.txt", "1.txt", "O.txt", "notes.txt"):
        (folder / name).write_text(name)
    (folder / "2.txt").write_text(" \n")
    assert read(folder).findings == (
        "4 of 6 photos have no caption (2.jpg, 3.jpg, 4.jpg, and 1 more) and get the "
        "prompt 'plain' instead: add a text file such as 2.txt.",
        "2 of 5 caption files belong to no photo (O.txt, notes.txt): name them like their photos, or remove them.",
    )


@pytest.mark.parametrize(
    ("files", "texts", "finding"),
    [
        (["0.txt", "0.caption"], ["0.txt", "plain"], "more than one caption file (0.txt and 0.caption)"),
        (["0.jpg.txt", "0.txt"], ["0.jpg.txt", "plain"], "more than one caption file (0.jpg.txt and 0.txt)"),
        (["1.txt", "1.TXT"], ["plain", "1.TXT"], "more than one caption file (1.TXT and 1.txt)"),
    ],
)
def test_several_caption_files_of_a_photo(files: list[str], texts: list[str], finding: str, tmp_path: Path) -> None:
    folder_of(tmp_path, "0.jpg", "1.jpg")
    for name in files:
        (tmp_path / name).write_text(name)
    assert read(tmp_path).texts == texts and finding in " ".join(read(tmp_path).findings)


def test_a_caption_file_of_two_photos(tmp_path: Path) -> None:
    folder_of(tmp_path, "0.jpg", "0.png")
    (tmp_path / "0.txt").write_text("both")
    assert read(tmp_path).texts == ["both", "both"]
    assert read(tmp_path).findings[0].startswith("Caption files belong to more than one photo (0.txt): name them like")
    (tmp_path / "0.png.txt").write_text("png")
    assert read(tmp_path).texts == ["both", "png"]


def test_captions_without_a_flag_are_found(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "0.jpg", "1.jpg")
    (folder / "notes.txt").write_text("no caption")
    assert read_captions(find_images(folder), "plain") == Captions(["plain"] * 2)
    (folder / "1.caption").write_text("a caption")
    write_rows(folder, ("0.jpg", "zero"))
    assert read_captions(find_images(folder), "plain").findings == (
        "Captions beside the photos are not read (1.caption, metadata.jsonl): add --use_captions, or remove them.",
    )


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_line_marks_inside_a_caption_do_not_cut_its_row(mark: str, tmp_path: Path) -> None:
    folder_of(tmp_path, "0.jpg", "1.jpg")
    written = mark if ord(mark) > 31 else f"\\u{ord(mark):04x}"
    rows = [f'{{"file_name": "{n}.jpg", "text": "a dog{written}here"}}' for n in (0, 1)]
    (tmp_path / "metadata.jsonl").write_bytes("\ufeff{}\r\n\r\n{}\r\n".format(*rows).encode())
    assert read(tmp_path, None) == Captions(["a dog here"] * 2)


ROWS: dict[str, str] = {
    '{"file_name": "0.jpg", "text": "a \\ud83d dog"}': "line 2 has half of an emoji",
    '{"file_name": "0.jpg", "text": "a \\ude00\\ud83d dog"}': "line 2 has half of an emoji",
    '{"file_name": "0.jpg", "text": "a \\u0000 dog"}': "a NUL in 'text'",
    '{"file_name": "0.jpg", "text": "a", "text": "b"}': "line 2 is not valid JSON (a key occurs twice)",
    "[" * 100_000: "line 2 is not valid JSON",
    '{"text": "a"}': "line 2 has no 'file_name'",
    '{"file_name": "", "text": "a"}': "line 2 has no 'file_name'",
    '{"file_name": 0, "text": "a"}': "line 2 has no 'file_name'",
    '["0.jpg", "a"]': "line 2 has no 'file_name'",
    '{"file_name": "0.jpg", "text": ["a"]}': "line 2 has no text under 'text'",
    '{"file_name": "0.jpg"': "line 2 is not valid JSON",
}


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_rows_that_cannot_be_read(row: str, tmp_path: Path) -> None:
    (folder_of(tmp_path, "0.jpg") / "metadata.jsonl").write_text("\n" + row)
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert ROWS[row] in str(error.value)


def test_whole_emoji_are_read(tmp_path: Path) -> None:
    write_rows(folder_of(tmp_path, "0 😀.jpg"), ("0 😀.jpg", "a 😀 dog"))  # written as pairs of escapes
    assert read(tmp_path, None) == Captions(["a 😀 dog"])


@pytest.mark.parametrize(
    "content", ["a é dog".encode("latin-1"), "a dog".encode("utf-16"), "a dog".encode("utf-16-le")]
)
def test_caption_files_in_other_encodings_are_refused(content: bytes, tmp_path: Path) -> None:
    (folder_of(tmp_path, "0.jpg") / "0.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"0.txt .*save it as"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000 + ".jpg", "a\0b.jpg", "\x1b[31m.jpg", "/", "..", "http://host/9.jpg?x=1"])
def test_odd_names_in_rows_are_only_unused(name: str, tmp_path: Path) -> None:
    write_rows(folder_of(tmp_path, "0.jpg"), ("0.jpg", "a"), (name, "b"))
    found: Any = read(tmp_path)
    assert found.texts == ["a"] and found.findings[0].startswith("1 of 2 rows") and len(found.findings[0]) < 300
    assert "\0" not in found.findings[0] and "\x1b" not in found.findings[0]


@pytest.mark.parametrize(
    "name", ["metadata.csv", "metadata.parquet", "Metadata.JSONL", "metadata.json", "meta_cap.json", "captions.json",
             "captions.tsv", "0.json", "0.jpg.json", "0.JSON"],
)  # fmt: skip
def test_captions_of_a_kind_that_is_not_read_are_a_finding(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "0.jpg", "1.jpg")
    (folder / name).write_text("0.jpg,a sks dog\n")
    for sidecars in (False, True):
        found = read_captions(find_images(folder), "plain", sidecars).findings
        assert f"Captions in files of this kind are not read ({name}): write them to metadata.jsonl" in "\n".join(found)


@pytest.mark.parametrize("name", ["subject.json", "settings.csv", "notes.md", "2.json"])
def test_other_files_are_no_captions(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "0.jpg", "1.jpg")
    (folder / name).write_text("{}")
    assert read_captions(find_images(folder), "plain").findings == ()
