"""Pictures that carry their settings, and sheets of labeled pictures."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ..errors import UserError
from ..io.files import write_atomic
from ..io.images import MAX_PIXELS, png
from .tags import Tag, parse_tags, tag_name

JSON_KEY = "nora_diffusion"
MAX_TEXT = 2**20


@dataclass
class ImageSettings:
    """Everything that made a picture.

    ``adapters`` are ``{"name", "weight", "sha256", "path"}``, with ``"te"`` where text encoders had another weight.
    ``dtype`` is the number type of the denoiser's weights.
    """

    prompt: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    negative_prompt: str = ""
    sampler: str = ""
    base: str = ""
    adapters: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    dtype: str = ""

    def parameters_text(self) -> str:
        """The text that A1111 and its relatives write and read under the PNG key ``parameters``."""
        lines = [" ".join([self.prompt, *(str(tag_of(adapter)) for adapter in self.adapters)])]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        values = {
            "Steps": self.steps,
            "Sampler": self.sampler,
            "CFG scale": f"{self.guidance:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.base,
        }
        hashes = ", ".join(f"{a['name']}: {a['sha256']}" for a in self.adapters if a["sha256"])
        parts = [f"{key}: {value}" for key, value in values.items() if value != ""]
        lines.append(", ".join(parts + ([f'Lora hashes: "{hashes}"'] if hashes else [])))
        return "\n".join(lines)


def tag_of(adapter: dict[str, Any]) -> Tag:
    """The prompt tag that asks for an adapter as a picture's settings describe it."""
    weight = float(adapter["weight"])
    return Tag(tag_name(str(adapter["name"])), weight, float(adapter.get("te", weight)))


def save_image(image: Image.Image, path: Path, settings: ImageSettings) -> Path:
    """Write a PNG with its settings, whole or not at all."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", settings.parameters_text())
    info.add_text(JSON_KEY, json.dumps(asdict(settings)))
    return write_atomic(path, png(image, info))


def read_settings(path: str | Path) -> ImageSettings:
    """The settings of a picture, from this toolkit's JSON or else from A1111's ``parameters``; no pixel is decoded.

    Raises :class:`UserError` for anything but a PNG of at most 40 megapixels that carries settings.
    """
    name = Path(path).name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG",)) as image:
                size, info = image.size, dict(image.info)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be read as a PNG picture: {error}") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(f"{name} is {size[0]}x{size[1]}, more than {MAX_PIXELS // 10**6} megapixels")
    if sum(len(text) for text in info.values() if isinstance(text, str)) > MAX_TEXT:
        raise UserError(f"{name} carries more than {MAX_TEXT // 2**20} MiB of text: it is not read")
    if isinstance(info.get(JSON_KEY), str):
        try:
            return _checked(ImageSettings(**json.loads(info[JSON_KEY])))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{name}: its settings are damaged ({error})") from error
    if isinstance(info.get("parameters"), str):
        return parse_parameters(info["parameters"])
    raise UserError(f"{name} carries no settings")


def _checked(settings: ImageSettings) -> ImageSettings:
    """The same, if every value is of its kind."""
    for field_ in fields(ImageSettings):
        value = getattr(settings, field_.name)
        kind = {"str": str, "int": int, "float": (int, float)}.get(str(field_.type), (list, dict))
        if not isinstance(value, kind) or isinstance(value, bool):  # type: ignore[arg-type]
            raise TypeError(f"{field_.name} is {str(value)[:40]!r}")
    for adapter in settings.adapters:
        tag_of(adapter)
    return settings


def parse_parameters(text: str) -> ImageSettings:
    """A1111's ``parameters``: the prompt, ``Negative prompt:``, and a last line of ``Key: value`` pairs.

    Tags stay in the prompt; their hashes come as ``adapters`` with what the text says, often only the first digits.
    """
    body, _, last = text.rpartition("\n")
    if "Steps: " not in last:
        raise UserError("the picture's parameters are not in the form that is known: they lack a line with Steps")
    prompt, _, negative = body.partition("\nNegative prompt: ")
    quoted = re.search(r'Lora hashes: "([^"]*)"', last)
    pairs = dict(re.findall(r"(\w[\w ]*): ([^,\"]+)", re.sub(r'[\w ]+: "[^"]*"', "", last)))
    clean, tags = parse_tags(prompt)
    hashes = dict(pair.split(": ", 1) for pair in (quoted[1] if quoted else "").split(", ") if ": " in pair)
    adapters = [
        {"name": t.name, "weight": t.unet, "te": t.te, "sha256": hashes.get(t.name, "").lower(), "path": ""}
        for t in tags
    ]
    try:
        width, height = (int(side) for side in pairs.get("Size", "0x0").split("x"))
        return ImageSettings(
            prompt=clean, seed=int(pairs["Seed"]), steps=int(pairs["Steps"]), guidance=float(pairs["CFG scale"]),
            width=width, height=height, negative_prompt=negative, sampler=pairs.get("Sampler", ""),
            base=pairs.get("Model", ""), adapters=adapters,
        )  # fmt: skip
    except (ValueError, KeyError) as error:
        raise UserError(f"the picture's parameters cannot be read ({error})") from error
