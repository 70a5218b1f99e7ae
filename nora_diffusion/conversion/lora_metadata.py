"""Metadata of exported LoRA files, as other tools' model browsers read it: sd-scripts' ``ss_*`` and ``modelspec.*``."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Literal

from PIL import Image

from ..formats.adapter_info import AdapterInfo
from ..formats.pack_writing import preview_of
from ..io.run_layout import SAMPLES

Architecture = Literal["sd1", "sd2", "sdxl"]
STABILITY_AI = "https://github.com/Stability-AI/generative-models"
THUMBNAIL_SIZE = 256
VERSIONS: dict[str, str] = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""sd-scripts' ``ss_base_model_version``, by which AUTOMATIC1111 shows a file for the right models."""
ARCHITECTURES: dict[str, str] = {
    "sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1-base",
}  # fmt: skip


def kohya_metadata(info: AdapterInfo, name: str, architecture: Architecture, rank: int, alpha: int) -> dict[str, str]:
    """What sd-scripts' trainer writes into a LoRA file, as far as the adapter knows it; ``name`` is the output's."""
    found = {
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:.1f}",
        "ss_output_name": name, "ss_base_model_version": VERSIONS[architecture], "ss_v2": str(architecture == "sd2"),
        "ss_sd_model_name": info.base, "ss_steps": str(info.step or ""),
        "ss_seed": "" if info.seed is None else str(info.seed),
    }  # fmt: skip
    if info.trigger:
        found["ss_tag_frequency"] = json.dumps({name: {info.trigger: 1}})
    return {key: value for key, value in found.items() if value}


def modelspec(info: AdapterInfo, name: str, architecture: Architecture) -> dict[str, str]:
    """Stability AI's model metadata: architecture, title, trigger phrase, license and thumbnail."""
    found = {
        "sai_model_spec": "1.0.1", "architecture": f"{ARCHITECTURES[architecture]}/lora",
        "implementation": STABILITY_AI if architecture == "sdxl" else "diffusers",
        "title": name, "trigger_phrase": info.trigger, "usage_hint": info.instance_prompt, "license": info.license,
    }  # fmt: skip
    metadata = {f"modelspec.{key}": value for key, value in found.items() if value}
    if thumbnail := _thumbnail(info):
        encoded = base64.b64encode(thumbnail).decode()
        metadata["modelspec.thumbnail"] = f"data:image/jpeg;base64,{encoded}"
        metadata["ssmd_cover_images"] = json.dumps([encoded])  # where AUTOMATIC1111 looks for an embedded preview
    return metadata


def hashes(data: memoryview) -> dict[str, str]:
    """SHA-256 of the tensors' bytes in the file, which does not depend on the metadata, under both tools' names."""
    digest = hashlib.sha256(data).hexdigest()
    return {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}


def _thumbnail(info: AdapterInfo) -> bytes:
    """The adapter's preview, or else the last sample of its training, as a small JPEG; empty if there is none."""
    try:
        content = preview_of(info.path) or _last_sample(Path(info.path).parent)
        with Image.open(io.BytesIO(content)) as image:
            small = image.convert("RGB")
        small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
        small.save(out := io.BytesIO(), "JPEG", quality=85)
        return out.getvalue()
    except (OSError, ValueError, Image.DecompressionBombError):
        return b""


def _last_sample(folder: Path) -> bytes:
    images = (folder / SAMPLES).glob("**/*.png")
    newest = max(images, key=lambda file: (file.stat().st_mtime, str(file)), default=None)
    return b"" if newest is None else newest.read_bytes()
