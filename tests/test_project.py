"""What stands around the code: make targets, version, changelog, citation, workflow, hooks and templates."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nora_diffusion import __version__
from nora_diffusion.versions import versions

ROOT = Path(__file__).parents[1]
# The sdist has no .github.
FORMS = sorted(p for p in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml") if p.name != "config.yml")
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", read("Makefile"), re.MULTILINE))


def test_every_make_target_is_listed() -> None:
    """``make help`` and CONTRIBUTING.md name each target and no other."""
    assert set(re.findall(r'@echo "make ([\w-]+) ', read("Makefile"))) == targets()
    assert set(re.findall(r"^\| `make ([\w-]+)` \|", read("CONTRIBUTING.md"), re.MULTILINE)) == targets()
    phony = re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.MULTILINE)
    assert phony and set(phony[1].split()) == targets()


def test_the_version_stands_in_one_place() -> None:
    assert re.findall(r'^__version__ = "(.*)"$', read("nora_diffusion/__init__.py"), re.MULTILINE) == [__version__]
    project = read("pyproject.toml")
    assert 'dynamic = ["version"]' in project and not re.search(r"^version\s*=", project, re.MULTILINE)
    assert versions()["nora-diffusion"] == __version__


def test_the_version_written_into_files_is_that_of_the_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may be installed beside a source tree, or none."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    assert versions()["nora-diffusion"] == __version__ and versions()["torch"] == "9.9"


def test_changelog_and_citation_name_this_release() -> None:
    sections = re.findall(r"^## (.*)$", read("CHANGELOG.md"), re.MULTILINE)
    citation = load(ROOT / "CITATION.cff")
    assert sections[:2] == ["[Unreleased]", f"[{__version__}] - {citation['date-released']}"]
    assert citation["version"] == __version__


@pytest.mark.skipif(os.environ.get("GITHUB_REF_TYPE") != "tag", reason="no release is being made")
def test_the_tag_names_this_release() -> None:
    assert os.environ["GITHUB_REF_NAME"] == f"v{__version__}"


def test_the_address_stands_in_one_place() -> None:
    """It can be set when the repository is published: only [project.urls] names it."""
    address = re.search(r'^Homepage = "https://(.*)"$', read("pyproject.toml"), re.MULTILINE)
    assert address
    others = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "CITATION.cff", *ROOT.glob(".github/**/*.*")]
    assert not [path.name for path in others if address[1] in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_the_workflow_calls_make(path: Path) -> None:
    """Each step of it can be run at home, and all supported releases of Python are tested on all systems."""
    jobs = load(path)["jobs"]
    called = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {word for line in called for word in line.split() if "=" not in word} - {"make"} <= targets()
    assert all(line.startswith("make ") for line in called)
    assert {"make check", "make test", "make test-slow", "make release-check"} <= set(called)
    matrix = jobs["test"]["strategy"]["matrix"]
    assert matrix["os"] == ["ubuntu-latest", "macos-latest", "windows-latest"]
    assert matrix["python"] == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', read("pyproject.toml"))


def test_the_hook_runs_what_make_runs() -> None:
    hooks = [hook for repo in load(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert [hook["entry"].split() for hook in hooks] == [["make", "check"]]


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.name)
def test_an_issue_form_is_one(path: Path) -> None:
    """What the hosting asks of a form; a broken one is not offered there, without a word."""
    form = load(path)
    assert {"name", "description", "body"} <= set(form)
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert asked and {field["type"] for field in asked} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert len({field["id"] for field in asked}) == len(asked)
    assert all(field["attributes"]["label"] for field in asked)
