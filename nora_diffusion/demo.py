"""The demo: train NoRA on a subject that the base never saw, then compare images with and without the adapter.

Libraries are imported when it runs: ``--help`` needs the names of the examples only.
"""

from __future__ import annotations

import json
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .io.files import make_folder, write_atomic

if TYPE_CHECKING:
    from PIL import Image

SUBJECT = "stripemug-red"
SEED = 0


def find_examples(package: Path) -> Path:
    """The folder of the example subjects: inside the package in a wheel (one subject), next to it in a clone (all)."""
    packaged = package / "examples" / "subjects"
    return packaged if packaged.is_dir() else package.parent / "examples" / "subjects"


EXAMPLES = find_examples(Path(__file__).parent)


@dataclass
class Example:
    """An example subject: its folder and the values of its ``subject.json``."""

    folder: Path
    values: dict[str, Any]

    @property
    def class_word(self) -> str:
        return str(self.values["class_word"])

    @property
    def phrase(self) -> str:
        """The subject in prompts, for example ``a sks monster``."""
        return str(self.values["instance_prompt"])

    @property
    def prompts(self) -> list[str]:
        """Prompt templates with ``{}`` for the subject, of scenes that are in no training image."""
        return [str(p) for p in self.values["demo_prompts"]]

    def images(self) -> list[Image.Image]:
        from .io.images import load_image

        return [load_image(f) for f in sorted(self.folder.glob("*.png"))]

    def heldout_images(self) -> list[Image.Image]:
        from .io.images import load_image

        return [load_image(self.folder / name) for name in self.values["heldout"]]


def example_names() -> list[str]:
    """The example subjects of this installation."""
    return sorted(f.parent.name for f in EXAMPLES.glob("*/subject.json"))


def open_example(slug: str) -> Example:
    """Open an example subject by name. Raises :class:`UserError` that lists the available ones."""
    names = example_names()
    if not names:
        raise UserError(f"there are no example subjects in {EXAMPLES}: reinstall nora-diffusion")
    if slug not in names:
        raise UserError(f"there is no example subject {slug!r}: choose one of {_available(names)}")
    file = EXAMPLES / slug / "subject.json"
    return Example(file.parent, json.loads(file.read_text(encoding="utf-8")))


def _available(names: list[str]) -> str:
    more = " (the package ships only this one; the source repository has more in examples/subjects)"
    return ", ".join(names) + (more if len(names) == 1 else "")


def run_demo(
    slug: str = SUBJECT, out: str | Path = "outputs/demo", max_train_steps: int | None = None
) -> dict[str, Any]:
    """Train, export, generate and score; writes the adapter, its LoRA, ``grid.png`` and ``report.json`` to ``out``."""
    example = open_example(slug)
    folder = make_folder(Path(out).expanduser())
    from .conversion.export import export_lora
    from .io.images import png
    from .training import train

    start = time.monotonic()
    result = train(_train_config(example, folder, max_train_steps))
    trained = time.monotonic()
    export = export_lora(folder, folder / "subject_lora.safetensors")
    base, nora = _generate(example, folder)
    finished = time.monotonic()
    write_atomic(folder / "grid.png", png(_grid(example, base, nora)))
    report = {
        "subject": slug,
        "seconds": {"learning": round(trained - start, 1), "generating": round(finished - trained, 1)},
        "steps": result.steps,
        "trained_numbers": result.trainable_parameters,
        "bytes": {
            "nora_adapter.safetensors": (folder / "nora_adapter.safetensors").stat().st_size,
            "subject_lora.safetensors": export.bytes,
        },
        "export_max_error": export.max_error,
        "scores": _scores(example, base, nora),
    }
    write_atomic(folder / "report.json", json.dumps(report, indent=2))
    return report


def _train_config(example: Example, folder: Path, max_train_steps: int | None) -> Any:
    from .training import TrainConfig

    return TrainConfig(
        instance_data_dir=str(example.folder), instance_prompt=example.phrase, use_captions=True,
        class_word=example.class_word, output_dir=str(folder), overwrite_output_dir=True, seed=SEED,
        max_train_steps=max_train_steps, license=str(example.values.get("license", "")) or None,
    )  # fmt: skip


def _generate(example: Example, folder: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    from .generation.sampling import sample_images
    from .generation.settings import Sampling
    from .loaders import load_adapter
    from .pipelines.base import load_base

    pipe, sampling = load_base(), Sampling.for_base(None)
    seeds = [SEED + i for i in range(len(example.prompts))]
    prompts = [p.format(example.phrase) for p in example.prompts]
    base = sample_images(pipe, prompts, seeds, sampling)
    load_adapter(pipe, folder, "subject")
    return base, sample_images(pipe, prompts, seeds, sampling)


def _grid(example: Example, base: list[Image.Image], nora: list[Image.Image]) -> Image.Image:
    from .reports.sheets import contact_sheet

    training = [(image, f"training image {i + 1}") for i, image in enumerate(example.images())]
    labels = [p.format(example.phrase) for p in example.prompts]
    return contact_sheet(
        [training, list(zip(base, labels, strict=True)), list(zip(nora, labels, strict=True))],
        ["Training images", "Base without the adapter", "Base with the NoRA adapter, same seeds"],
        side=192,
    )


def _scores(example: Example, base: list[Image.Image], nora: list[Image.Image]) -> dict[str, dict[str, float]]:
    """CLIP-I against held-out images of the subject and CLIP-T against the prompts, by the tiny CLIP."""
    from .scoring.judges import load_judge, prompt_score, subject_score

    judge = load_judge()
    references = example.heldout_images()
    prompts = [p.format(f"a {example.class_word}") for p in example.prompts]
    return {
        name: {
            "subject": round(subject_score(judge, images, references), 3),
            "prompt": round(prompt_score(judge, images, prompts), 3),
        }
        for name, images in (("base", base), ("nora", nora))
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    scores = report["scores"]
    lines = [
        f"subject            {report['subject']}",
        f"training           {report['seconds']['learning']} s for {report['steps']} steps",
        f"generating         {report['seconds']['generating']} s",
        f"trained parameters {report['trained_numbers']:,}",
        *(f"{name:<26} {size / 1024:,.0f} KiB" for name, size in report["bytes"].items()),
        f"export error       max |dW_file - dW| = {report['export_max_error']:.1e}",
        "                   subject score   prompt score   (tiny CLIP, cosine)",
        *(f"{name:<18} {s['subject']:>13.3f} {s['prompt']:>14.3f}" for name, s in scores.items()),
        "",
        *textwrap.wrap(f"--subject takes {_available(example_names())}", 100, break_on_hyphens=False),
    ]
    return "\n".join(lines)
