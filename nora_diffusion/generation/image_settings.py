"""Settings stored in an image's file: written as JSON and as A1111's ``parameters``, and read back."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ..errors import UserError
from ..formats.adapter_info import AdapterInfo
from ..io.files import write_atomic
from ..io.images import MAX_PIXELS, png
from .tags import Tag, parse_tags, short_number, tag_name

JSON_KEY = "nora_diffusion"
MAX_TEXT = 2**18
"""Longest settings that are read, in characters; other texts in the file do not count."""
LABEL = re.compile(r"^([^\S\n]*(?:Negative prompt|Steps) *):", re.MULTILINE | re.IGNORECASE)
ESCAPED_LABEL = re.compile(LABEL.pattern.replace(" *):", " *) :"), LABEL.flags)
"""A line of a prompt that readers of ``parameters`` take for one of theirs gets a space before its colon. Text encoders
see no difference."""
NEGATIVE = re.compile(r"(?:^|\n)Negative prompt: ?")
QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


@dataclass
class ImageSettings:
    """Everything that determines an image.

    Each of ``adapters`` is ``{"name", "weight", "sha256", "path"}``, with ``"te"`` if the weight on text encoders
    differs. ``dtype`` is that of the denoiser's weights. ``width`` and ``height`` are those of the first pass.
    ``start``: the image that it starts from, ``{"image", "sha256", "strength", "mask", ...}`` (none: it starts from
    noise). ``hires``: the second pass, ``{"scale", "strength"}``.
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
    start: dict[str, Any] = field(default_factory=dict)
    hires: dict[str, Any] = field(default_factory=dict)

    def parameters_text(self) -> str:
        """The text under the PNG key ``parameters``, as A1111 and its forks write it.

        :func:`parse_parameters` reads the same prompts and numbers from it.
        """
        lines = [" ".join([LABEL.sub(r"\1 :", self.prompt), *(str(tag_of(adapter)) for adapter in self.adapters)])]
        if self.negative_prompt:
            lines.append("Negative prompt: " + LABEL.sub(r"\1 :", self.negative_prompt))
        values = {
            "Steps": self.steps,
            "Sampler": self.sampler,
            "CFG scale": short_number(self.guidance),
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.base,
            "Denoising strength": _number(self.start or self.hires, "strength"),
            "Hires upscale": _number(self.hires, "scale"),
            "Hires upscaler": "Lanczos" if self.hires else "",
            "Lora hashes": ", ".join(f"{tag_of(a).name}: {a['sha256']}" for a in self.adapters if a["sha256"]),
        }
        lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in values.items() if value != ""))
        return "\n".join(lines)


def _number(values: dict[str, Any], name: str) -> str:
    return short_number(float(values[name])) if values else ""


def _quoted(value: str) -> str:
    """A value of the last line, in quotes where it could be taken for several, as A1111 does."""
    return json.dumps(value, ensure_ascii=False) if any(char in value for char in ',:"\n') else value


def adapter_settings(info: AdapterInfo, path: str, name: str, unet: float, te: float | None = None) -> dict[str, Any]:
    """One of :attr:`ImageSettings.adapters`; ``path``: as it may be shown, ``te``: default: the same as ``unet``."""
    values = {"name": name, "weight": unet, "sha256": info.sha256, "path": path, "trigger": info.trigger}
    return values if te in (None, unet) else {**values, "te": te}


def tag_of(adapter: dict[str, Any]) -> Tag:
    """The prompt tag for one of :attr:`ImageSettings.adapters`."""
    weight = float(adapter["weight"])
    return Tag(tag_name(str(adapter["name"])), weight, float(adapter.get("te", weight)))


def save_image(image: Image.Image, path: Path, settings: ImageSettings) -> Path:
    """Write a PNG with its settings, atomically."""
    return write_atomic(path, png_with_settings(image, settings))


def png_with_settings(image: Image.Image, settings: ImageSettings) -> bytes:
    """Encode an image and its settings as PNG."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", settings.parameters_text())
    info.add_text(JSON_KEY, json.dumps(asdict(settings)))
    return png(image, info)


def read_settings(path: str | Path) -> ImageSettings:
    """The settings in an image file: this toolkit's JSON, or else A1111's ``parameters``. Decodes no pixels.

    Raises :class:`UserError` for anything but a PNG with settings of at most 40 megapixels.
    """
    name = Path(path).name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG",)) as image:
                size, info = image.size, dict(image.info)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be read as a PNG image: {error}") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(f"{name} is {size[0]}x{size[1]}, more than {MAX_PIXELS // 10**6} megapixels")
    texts = {key: info[key] for key in (JSON_KEY, "parameters") if isinstance(info.get(key), str)}
    if any(len(text) > MAX_TEXT for text in texts.values()):
        raise UserError(f"{name} has settings of more than {MAX_TEXT // 2**10} KiB, which are not read")
    if JSON_KEY in texts:
        try:
            return settings_from(json.loads(texts[JSON_KEY]))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: its settings are damaged ({str(error)[:80]})") from error
    if "parameters" in texts:
        return parse_parameters(texts["parameters"])
    raise UserError(f"{name} has no settings")


def settings_from(values: Any) -> ImageSettings:
    """Settings from the JSON object of a file or of a server. Raises ``ValueError`` for one that is damaged."""
    try:
        return _checked(ImageSettings(**values))
    except (TypeError, KeyError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _checked(settings: ImageSettings) -> ImageSettings:
    """Return ``settings``. Raises :class:`TypeError` if a value has the wrong type."""
    for field_ in fields(ImageSettings):
        value = getattr(settings, field_.name)
        expected = {"str": str, "int": int, "float": (int, float)}.get(str(field_.type), (list, dict))
        if not isinstance(value, expected) or isinstance(value, bool):  # type: ignore[arg-type]
            raise TypeError(f"{field_.name} is {str(value)[:40]!r}")
    for adapter in settings.adapters:
        tag_of(adapter)
    for values, names in ((settings.start, ("strength",)), (settings.hires, ("scale", "strength"))):
        if values and not all(isinstance(values.get(name), int | float) for name in names):
            raise TypeError(f"{names} are not numbers in {str(values)[:40]!r}")
    return settings


def parse_parameters(text: str) -> ImageSettings:
    """Parse A1111's ``parameters``: the prompt, ``Negative prompt:``, and a last line of ``Key: value`` pairs.

    Tags are taken out of the prompt into ``adapters``, with their hashes as the text has them (often only the first
    digits).
    """
    body, _, last = text.rpartition("\n")
    if "Steps: " not in last:
        raise UserError("the image's parameters are not in A1111's format: a line with 'Steps: ' is missing")
    prompt, negative, *_ = [ESCAPED_LABEL.sub(r"\1:", part) for part in NEGATIVE.split(body, maxsplit=1)] + [""]
    pairs = _read_pairs(last)
    clean, tags = parse_tags(prompt)
    hashes = _read_pairs(pairs.get("Lora hashes", ""))
    adapters = [
        {"name": t.name, "weight": t.unet, "te": t.te, "sha256": hashes.get(t.name, "").lower(), "path": ""}
        for t in tags
    ]
    try:
        width, height = (int(side) for side in pairs.get("Size", "0x0").split("x"))
        return ImageSettings(
            prompt=clean, seed=int(pairs["Seed"]), steps=int(pairs["Steps"]), guidance=float(pairs["CFG scale"]),
            width=width, height=height, negative_prompt=negative, sampler=pairs.get("Sampler", ""),
            base=pairs.get("Model", ""), adapters=adapters, hires=_hires(pairs),
        )  # fmt: skip
    except (ValueError, KeyError) as error:
        raise UserError(f"the image's parameters cannot be read ({str(error)[:80]})") from error


def _hires(pairs: dict[str, str]) -> dict[str, Any]:
    """A second pass with a factor; A1111 can also give its size in pixels, which is not read."""
    if "Hires upscale" not in pairs:
        return {}
    return {"scale": float(pairs["Hires upscale"]), "strength": float(pairs.get("Denoising strength", 0.5))}


def _read_pairs(line: str) -> dict[str, str]:
    """Read ``Key: value, Key: "quoted, value"``. Each ``find`` continues at the last one's end, so time is linear."""
    pairs, position = {}, 0
    while (colon := line.find(": ", position)) >= 0:
        key, position = line[position:colon].rpartition(",")[2].strip(), colon + 2
        if quoted := QUOTED.match(line, position):
            with contextlib.suppress(ValueError):
                pairs[key] = str(json.loads(quoted[0], strict=False))
            position = quoted.end()
        else:
            end = line.find(",", position)
            pairs[key], position = line[position : end if end >= 0 else None].strip(), end if end >= 0 else len(line)
    return pairs
