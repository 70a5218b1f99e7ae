"""The model card that lies beside every adapter."""

from __future__ import annotations

import logging
from pathlib import Path

from ..io.files import user_errors, write_atomic
from .adapter_file import AdapterInfo

log = logging.getLogger(__name__)

TEMPLATE = """---
base_model: {base}
library_name: nora_diffusion
license: {license}
tags: [text-to-image, diffusers, {method}, subject-driven]
---
# {title}

A {method} adapter ({ranks}) for `{base}`: {trained:,} trained numbers.
{trigger}
```python
from nora_diffusion import load_adapter, open_pipeline

pipe = open_pipeline("{base}")
load_adapter(pipe, "{folder}")
image = pipe("{prompt}", num_inference_steps=20).images[0]
```

As a plain LoRA for other tools: `nora-diffusion export {folder} {folder}_lora.safetensors`.

| | |
| --- | --- |
| parts | {parts} |
| targets | {targets} |
| steps | {step} |
| seed | {seed} |
| file | {bytes:,} bytes, SHA-256 `{sha256}` |
| made with | {versions} |
"""


def write_card(folder: Path, info: AdapterInfo, extra: str | None = None) -> Path:
    """Write ``README.md`` from what the adapter file says of itself, with ``extra`` Markdown at its end.

    A ``README.md`` that is no such card is left as it is, with a warning.
    """
    file = folder / "README.md"
    if file.exists() and not is_card(file):
        log.warning("%s is no model card of nora_diffusion: it is left as it is, and no card is written", file)
        return file
    config = next(iter(info.components.values()))
    targets = config["target_modules"]
    trigger = f"\nSay `{info.trigger}` in the prompt to get the subject.\n" if info.trigger else ""
    if info.tokens:
        trigger += (
            f"\nNew tokens, known to the text encoder while the adapter is loaded: `{'`, `'.join(info.tokens)}`.\n"
        )
    text = TEMPLATE.format(
        base=info.base, license=info.license or "other", method=info.method, title=info.trigger or folder.name,
        ranks=info.ranks, trained=info.trained_parameters, trigger=trigger, folder=folder.name,
        prompt=info.instance_prompt or info.trigger or "your prompt", parts=", ".join(info.components),
        targets=targets if isinstance(targets, str) else ", ".join(targets), step=info.step, seed=info.seed,
        bytes=info.bytes, sha256=info.sha256,
        versions=", ".join(f"{name} {version}" for name, version in info.versions.items()),
    )  # fmt: skip
    return write_atomic(file, text + (f"\n{extra}\n" if extra else ""))


def is_card(file: Path) -> bool:
    """Whether the front matter says that we wrote it."""
    with user_errors(file):
        front, *_ = file.read_text(encoding="utf-8", errors="replace").removeprefix("---").split("\n---\n")
    return "library_name: nora_diffusion" in front.splitlines()
