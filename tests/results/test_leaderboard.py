"""The leaderboard of small files whose numbers are worked out by hand."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
from PIL import Image
from result_files import example, row

from nora_diffusion.cli import main
from nora_diffusion.errors import UserError
from nora_diffusion.results.curves import families
from nora_diffusion.results.files import write_results
from nora_diffusion.results.leaderboard import markdown, page, read_all, table
from nora_diffusion.results.protocols import Protocol, protocols
from nora_diffusion.results.ranking import at_best_rate, difference, front, rank
from nora_diffusion.results.schema import Images, Results, Row

LORA = [
    row("base", "cat", None, 0.5, 0.1), row("base", "dog", None, 0.7, 0.3),
    row("lora", "cat", 1e-3, 0.30, 0.7), row("lora", "dog", 1e-3, 0.40, 0.6),
    row("lora", "cat", 2e-3, 0.26, 0.8), row("lora", "dog", 2e-3, 0.42, 0.6),
    row("lora", "cat", 4e-3, 0.50, 0.8), row("lora", "dog", 4e-3, 0.50, 0.6),
]  # fmt: skip
"""For the cat 1e-3 is chosen, which is best for the dog; for the dog 2e-3. So LoRA's mean is (.30 + .42) / 2 = .36."""
NORA = [
    row("nora", "cat", 8e-3, 0.20, 0.5), row("nora", "dog", 8e-3, 0.44, 0.5),
    row("weak", "cat", 8e-3, 0.60, 0.5), row("weak", "dog", 8e-3, 0.80, 0.5),
]  # fmt: skip


@pytest.fixture
def files() -> list[Results]:
    return [example(LORA), replace(example(NORA), name="second")]


def test_each_subject_is_reported_at_the_rate_that_the_others_choose(files: list[Results]) -> None:
    (protocol,) = protocols(files)
    chosen = at_best_rate(protocol, "lora")
    assert {(row.subject, row.rate) for row in chosen} == {("cat", 1e-3), ("dog", 2e-3)}
    ranking = rank(protocol)
    nora, lora, weak = ranking.standings
    assert (nora.method, lora.method, weak.method) == ("nora", "lora", "weak")
    assert nora.scores["heldout_loss"].mean == pytest.approx(0.32) and lora.scores[
        "heldout_loss"
    ].mean == pytest.approx(0.36)
    assert lora.rates == [1e-3, 2e-3] and lora.at_end and not nora.at_end  # 1e-3 is the first of its list
    gap = difference(nora, lora, "heldout_loss")  # -.10 for the cat, +.02 for the dog
    assert (
        gap and gap.mean == pytest.approx(-0.04) and (gap.low, gap.high) == (pytest.approx(-0.1), pytest.approx(0.02))
    )
    assert front(ranking) == {"nora"}  # LoRA has more parameters, and "weak" as many


def test_a_larger_and_better_method_is_on_the_front_too(files: list[Results]) -> None:
    worse = [row("nora", "cat", 8e-3, 0.40, 0.5), row("nora", "dog", 8e-3, 0.50, 0.5)]
    (protocol,) = protocols([files[0], example(worse)])
    assert front(rank(protocol)) == {"lora", "nora"}


def test_methods_without_a_common_seed_are_paired_by_subject(files: list[Results]) -> None:
    moved = [replace(row, seed=row.seed + 5) for row in NORA]
    (protocol,) = protocols([files[0], example(moved)])
    nora, lora, _ = rank(protocol).standings
    gap = difference(nora, lora, "heldout_loss")
    assert gap and gap.mean == pytest.approx(-0.04) and gap.low == pytest.approx(-0.1)
    again = [*moved, *(replace(row, seed=6, scores=row.scores | {"heldout_loss": 1.0}) for row in NORA)]
    (protocol,) = protocols([files[0], example(again)])
    twice = {standing.method: standing for standing in rank(protocol).standings}
    gap = difference(twice["nora"], twice["lora"], "heldout_loss")  # (.20 + 1) / 2 - .30 and (.44 + 1) / 2 - .42
    assert gap and gap.mean == pytest.approx(0.3)


def test_the_table(files: list[Results]) -> None:
    (protocol,) = protocols(files)
    header, rows = table(rank(protocol))
    cells = [dict(zip(header, line, strict=True)) for line in rows]
    assert [line["method"] for line in cells] == ["base", "nora", "lora", "weak"]
    assert cells[0]["held-out loss"] == "0.6000 [0.5000, 0.7000]" and cells[0]["trained parameters"] == ""
    assert cells[1]["held-out loss"] == "0.3200 [0.2000, 0.4400]"
    assert cells[1]["held-out loss minus lora's"] == "-0.0400 [-0.1000, +0.0200]"
    assert cells[1]["subject score minus lora's"] == "-0.150 [-0.200, -0.100]"
    assert (cells[2]["rate"], cells[2]["held-out loss minus lora's"]) == ("0.001, 0.002 ↕", "")
    assert (cells[2]["trained parameters"], cells[2]["rows"], cells[2]["seconds"]) == ("400", "2", "2.0")
    assert [line["Pareto"] for line in cells] == ["", "●", "", ""]


def test_only_equal_protocols_share_a_table(files: list[Results]) -> None:
    def changed(what: str) -> Results:
        file = replace(example(NORA), name=what)
        images = {"training": Images(3, "d" * 64)}
        return {
            "precision": replace(file, protocol=file.protocol | {"precision": "no"}),
            "base": replace(file, base=replace(file.base, fingerprint="e" * 64)),
            "judges": replace(file, judges={"clip": "d" * 64}),
            "data": replace(file, data={"six": {"cat": images, "dog": images}}),
            "steps": replace(file, rows=[replace(row, steps=50) for row in file.rows]),
        }[what]

    for what in ("precision", "base", "judges", "data"):
        assert [len(p.rows) for p in protocols([files[0], changed(what)])] == [8, 4]
    shorter, longer = protocols([files[0], changed("steps")])
    assert (shorter.steps, longer.steps) == (50, 100)
    trained = [
        replace(file, rows=[row for row in file.rows if row.is_trained]) for file in (files[0], changed("steps"))
    ]
    assert [[file.name for file in own.sources] for own in protocols(trained)] == [["steps"], [files[0].name]]
    assert shorter.untrained == longer.untrained == ["base"]  # which no step changes
    assert shorter.trained == ["nora", "weak"] and longer.trained == ["lora"]


def test_rows_of_several_files_count_once_and_other_settings_have_another_name(files: list[Results]) -> None:
    again = replace(example(LORA), name="again")
    (protocol,) = protocols([files[0], again])
    assert len(protocol.rows) == len(LORA)
    (protocol,) = protocols([files[0], replace(again, methods=again.methods | {"lora": {"rank": 4}})])
    assert protocol.trained == ["lora", "lora (again)"]


def test_a_rate_that_was_not_tried_everywhere_is_not_chosen() -> None:
    lucky = row("lora", "cat", 8e-3, 0.01, 0.9)
    (protocol,) = protocols([example([*LORA, lucky])])
    assert {row.rate for row in at_best_rate(protocol, "lora")} == {1e-3, 2e-3}


def test_a_training_that_diverged_is_the_last() -> None:
    failed = [
        replace(row("wild", subject, 1.0, math.inf, 0.0), trained_parameters=0, error="diverged")
        for subject in ("cat", "dog")
    ]
    (protocol,) = protocols([example([*LORA, *failed])])
    header, rows = table(rank(protocol))
    cells = dict(zip(header, rows[-1], strict=True))
    assert cells["method"] == "wild" and cells["held-out loss"] == "diverged" and cells["Pareto"] == ""
    assert "diverged" in page([rank(protocol)])


def test_a_single_row_has_no_interval() -> None:
    rows = [row("lora", "cat", 1e-3, 0.3, 0.7), row("nora", "cat", 8e-3, 0.2, 0.5)]
    (protocol,) = protocols([example(rows)])
    header, (first, _) = table(rank(protocol))
    cells = dict(zip(header, first, strict=True))
    assert (cells["method"], cells["held-out loss"], cells["held-out loss minus lora's"]) == (
        "nora", "0.2000", "-0.1000",
    )  # fmt: skip


def test_text_of_a_file_is_escaped(files: list[Results]) -> None:
    odd = "<script>|`nora`"
    rows: list[Row] = [replace(row, method=odd) for row in NORA[:2]]
    file = replace(example(rows), name="<b>x</b>")
    rankings = [rank(protocol) for protocol in protocols([files[0], file])]
    for text in (markdown(rankings), page(rankings)):
        assert "<script>" not in text and "<b>x" not in text and "&lt;script&gt;" in text


def test_text_of_a_file_makes_no_links_and_no_images() -> None:
    odd = "![x](https://example.org/x.png)"
    text = markdown([rank(protocol) for protocol in protocols([example([replace(r, method=odd) for r in NORA[:2]])])])
    assert "![x] (https" in text and "](" not in text


def test_three_files_of_one_name_do_not_mix_methods_of_one_name(files: list[Results]) -> None:
    others = [replace(example(LORA), name="mine", methods={"lora": {"rank": r}, "base": {"rank": 8}}) for r in (4, 2)]
    (protocol,) = protocols([files[0], *others])
    assert protocol.trained == ["lora", "lora (mine)", "lora (mine, 2)"]
    assert [protocol.methods[name]["rank"] for name in protocol.trained] == [8, 4, 2]


def test_files_that_disagree_on_the_better_direction_are_refused(files: list[Results]) -> None:
    wrong = replace(example(NORA), name="wrong", scores={"heldout_loss": "higher", "subject_score": "higher"})
    with pytest.raises(UserError, match="wrong says that a higher heldout_loss is better"):
        protocols([files[0], wrong])


def test_the_criterion_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each row: with thousands of rows that took minutes."""
    counted = []
    criterion = vars(Protocol)["criterion"].func
    own = cached_property(lambda protocol: counted.append(1) or criterion(protocol))
    own.__set_name__(Protocol, "criterion")
    monkeypatch.setattr(Protocol, "criterion", own)
    (protocol,) = protocols([example(LORA + NORA)])
    page([rank(protocol)])
    assert len(counted) == 1


def test_the_command(files: list[Results], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(write_results(file, tmp_path / f"{file.name}.json")) for file in files]
    assert main(["leaderboard", *names, "--out", str(tmp_path / "out"), "--reference", "weak"]) == 0
    text = (tmp_path / "out/leaderboard.md").read_text()
    assert text in capsys.readouterr().out and "held-out loss minus weak's" in text
    assert (
        "2 subjects, 1 seed, 12 rows, from example (2026-11-30), second (2026-11-30). Protocol: precision bf16" in text
    )
    html = (tmp_path / "out/leaderboard.html").read_text()
    assert html.count("<svg") == 4 and "Held-out loss over size" in html
    assert main(["leaderboard", str(tmp_path)]) == 2


def sized(method: str, settings: dict[str, object], parameters: int) -> Results:
    """A method trained on both subjects, in a file of its own."""
    rows = [replace(row(method, subject, 2e-3, 0.3, 0.5), trained_parameters=parameters) for subject in ("cat", "dog")]
    return replace(example(rows), name=method, methods={method: settings})


def test_a_line_joins_methods_that_differ_in_size_alone() -> None:
    layers, every = ["attn", "ff"], ["attn", "ff", "conv"]
    (protocol,) = protocols([
        sized("lora_few", {"method": "lora", "rank": 32, "target_modules": layers}, 900),
        sized("lora", {"method": "lora", "rank": 8, "target_modules": every}, 400),
        sized("lora_r2", {"method": "lora", "rank": 2, "target_modules": every}, 100),
        sized("lora_text", {"method": "lora", "rank": 8, "target_modules": every, "train_text_encoder": True}, 500),
        sized("nora", {"method": "nora", "rank": 32, "inner_rank": 16, "basis": "awsvd"}, 110),
        sized("nora_8", {"method": "nora", "rank": 24, "inner_rank": 8, "basis": "awsvd"}, 30),
        sized("nora_svd", {"method": "nora", "rank": 32, "inner_rank": 16, "basis": "svd"}, 110),
        sized("mine", {"rank": 3, "target_modules": layers}, 200),
    ])  # fmt: skip
    assert families(protocol) == {
        "lora_few": "lora:target_modules=attn+ff", "lora": "lora", "lora_r2": "lora",
        "lora_text": "lora:train_text_encoder=true", "nora": "nora", "nora_8": "nora", "nora_svd": "nora:basis=svd",
        "mine": "mine",
    }  # fmt: skip
    html = page([rank(protocol)])
    assert html.count("<i style") == len({*families(protocol).values()})  # one legend for all charts
    lines = [line.split() for line in re.findall(r'<polyline points="([^"]*)"', html)]
    assert sorted(map(len, lines[:6])) == [1, 1, 1, 1, 2, 2]


def test_curves_of_many_methods_have_colors_of_their_own_and_a_single_rate_has_no_curve() -> None:
    rates = [row(f"m{n}", s, rate, 0.3 + rate, 0.5) for n in range(9) for s in ("cat", "dog") for rate in (1e-3, 2e-3)]
    (protocol,) = protocols([example([*rates, *NORA])])
    html = page([rank(protocol)])
    first, second = re.findall(r"over rates \(\d\)</figcaption>.*?</figure>", html)
    assert [first.count("<polyline"), second.count("<polyline")] == [4, 5] and "nora" not in first + second
    (protocol,) = protocols([example(LORA)])
    assert "Held-out loss over rates: lora<" in page([rank(protocol)])


def test_names_of_judges_and_methods_keep_their_capitals() -> None:
    rows = [replace(r, method="LoRA", scores={"clip_i": r.scores["subject_score"]}) for r in LORA[2:]]
    file = replace(example(rows), scores={"clip_i": "higher"}, methods={"LoRA": {}})
    html = page([rank(protocol) for protocol in protocols([file])])
    assert "<figcaption>CLIP-I over size<" in html and "<figcaption>CLIP-I over rates: LoRA<" in html


def test_a_score_that_never_differs_has_no_curve(files: list[Results]) -> None:
    html = page([rank(protocol) for protocol in protocols(files)])
    assert "Subject score over size" in html
    same = [
        replace(file, rows=[replace(r, scores=r.scores | {"subject_score": 0.0}) for r in file.rows]) for file in files
    ]
    html = page([rank(protocol) for protocol in protocols(same)])
    assert "Subject score over size" not in html and "Held-out loss over size" in html


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_curves_can_be_drawn_as_an_image(files: list[Results], tmp_path: Path) -> None:
    """By Chromium, for docs/benchmark.md."""
    pytest.importorskip("playwright")
    if not any(map(shutil.which, ("chromium", "google-chrome"))):
        pytest.skip("needs Chromium")
    names = [str(write_results(file, tmp_path / f"{file.name}.json")) for file in files]
    program = [sys.executable, str(ROOT / "benchmarks/curves.py"), *names, "--picture", str(tmp_path / "curves.png")]
    subprocess.run(program, check=True, cwd=ROOT)
    with Image.open(tmp_path / "curves.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20) or []}
        assert image.width > 1000 and (13, 148, 136) in colors  # the second line's


def without_intervals(text: str) -> list[str]:
    """The resamples of another release of NumPy may differ."""
    return re.sub(r" \[[^]]*\]", "", text).splitlines()


@pytest.mark.skipif(not [*ROOT.glob("results/*.json")], reason="there are no submitted results")
def test_the_leaderboard_is_that_of_the_submitted_files() -> None:
    files = read_all(sorted(ROOT.glob("results/*.json")))
    text = (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    assert without_intervals(markdown([*map(rank, protocols(files))])) == without_intervals(text), (
        "run make leaderboard"
    )
