"""The model card (``README.md``) of an adapter."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import ModelCardData

from ..io.files import user_errors, write_atomic
from .adapter_info import AdapterInfo

log = logging.getLogger(__name__)

LIBRARY = "nora_diffusion"
TEMPLATE = """---
{front_matter}
---
# {title}

A {method} adapter ({ranks}) for `{base}`: {trained:,} trained parameters.
{trigger}
```python
from nora_diffusion import load_adapter, open_pipeline

pipe = open_pipeline("{base}")
load_adapter(pipe, "{folder}")
image = pipe("{prompt}", num_inference_steps=20).images[0]
```

{export}: `nora-diffusion export {folder} {folder}_lora.safetensors{gate}`.

| | |
| --- | --- |
| components | {components} |
| targets | {targets} |
| steps | {step} |
| seed | {seed} |
| file | {bytes:,} bytes, SHA-256 `{sha256}` |
| made with | {versions} |
"""

EXPORTS = {
    False: ("As a plain LoRA for other tools", ""),
    True: ("No plain LoRA equals its gates; one with the gates fixed at their mean", " --gate mean"),
}
"""How the card introduces the export of an adapter, and its further flags; by whether it is routed."""


def write_card(folder: Path, info: AdapterInfo, extra: str | None = None) -> Path:
    """Write ``README.md`` from the adapter's metadata, followed by ``extra`` Markdown.

    A ``README.md`` that this toolkit did not write is left unchanged, with a warning.
    """
    file = folder / "README.md"
    if file.exists() and not is_card(file):
        log.warning("%s is not a model card of nora_diffusion: it is left unchanged, and no card is written", file)
        return file
    config = next(iter(info.components.values()))
    targets, routed = config["target_modules"], config.get("router", "none") != "none"
    trigger = f"\nUse `{info.trigger}` in the prompt to get the subject.\n" if info.trigger else ""
    if info.tokens:
        trigger += f"\nNew tokens, available while the adapter is loaded: `{'`, `'.join(info.tokens)}`.\n"
    front_matter = ModelCardData(
        base_model=info.base, library_name=LIBRARY, license=info.license or "other",
        tags=["text-to-image", "diffusers", info.method, "subject-driven"],
    ).to_yaml()  # fmt: skip
    text = TEMPLATE.format(
        front_matter=front_matter, base=info.base, method=info.method, title=info.trigger or folder.name,
        ranks=info.ranks, trained=info.trained_parameters, trigger=trigger, folder=folder.name,
        prompt=info.instance_prompt or info.trigger or "your prompt", components=", ".join(info.components),
        targets=targets if isinstance(targets, str) else ", ".join(targets), step=info.step, seed=info.seed,
        bytes=info.bytes, sha256=info.sha256, export=EXPORTS[routed][0], gate=EXPORTS[routed][1],
        versions=", ".join(f"{name} {version}" for name, version in info.versions.items()),
    )  # fmt: skip
    return write_atomic(file, text + (f"\n{extra}\n" if extra else ""))


def is_card(file: Path) -> bool:
    """Whether the front matter of a ``README.md`` names this toolkit."""
    with user_errors(file):
        front, *_ = file.read_text(encoding="utf-8", errors="replace").removeprefix("---").split("\n---\n")
    return f"library_name: {LIBRARY}" in front.splitlines()
