"""An image to start from in the Generate tab: a photo or a finished image, a mask painted on it, how much changes."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import UserError
from ...generation.start_image import StartImage
from ...io.files import make_folder, write_atomic
from ...io.images import decode, png
from ...reports.webpage import data_uri
from ..layout.cards import line
from ..layout.page import PRIVATE, UNQUEUED, Page, handler
from ..layout.painting import painter
from ..messages import sentence
from ..state import App

SHOWN = 640
"""Longer side of the image as it is shown, and of the mask that is painted on it."""
PADDING = 1 / 8
"""Of the longer side of the image, around a mask that is generated at the base's full size."""
PREFIX = "data:image/png;base64,"


@dataclass
class StartFields:
    """The components of this part of the form."""

    file: gr.File
    mask: gr.Textbox
    strength: gr.Slider
    closely: gr.Checkbox
    accordion: gr.Accordion

    def inputs(self) -> list[Any]:
        """The components whose values :func:`start_of` reads, in its order."""
        return [self.file, self.mask, self.strength, self.closely]


def build(page: Page) -> StartFields:
    """The fields, folded; a server cannot start from images."""
    with gr.Accordion("Start from an image", open=False, elem_id="from-image",
                      visible=not page.app.engine.is_remote) as accordion:  # fmt: skip
        file = gr.File(label="Photo or image", file_types=["image"], height=140, elem_id="start-file")
        shown = gr.HTML("", elem_id="start-painter")
        strength = gr.Slider(0.05, 1, 0.7, step=0.05, label="How much changes", elem_id="start-strength")
        closely = gr.Checkbox(
            True, label="Draw what is painted at full size",
            info="Only the part around it is drawn, and put back into the image, which keeps its size",
        )  # fmt: skip
    mask = gr.Textbox("", visible=False)  # filled by the page when the button is pressed

    def show(path: str | None) -> str:
        if not path:
            return ""
        try:
            image = StartImage(Path(path)).source.image
        except UserError as error:
            return line(sentence(error), bad=True)
        image.thumbnail((SHOWN, SHOWN))
        return painter(data_uri(image, "JPEG", quality=90), image.size)

    file.change(handler(show), file, shown, api_name="start_image", **PRIVATE)
    return StartFields(file, mask, strength, closely, accordion)


def send_to(page: Page, gallery: gr.Gallery, fields: StartFields) -> None:
    """A button below the images, which starts from the one that is open."""
    chosen = gr.State(None)
    button = gr.Button("Start from this image", visible=False, size="sm", elem_id="start-from-this")

    def choose(event: gr.SelectData) -> tuple[int, Any]:
        return int(event.index), gr.update(visible=not page.app.engine.is_remote)

    def send(images: list[Any] | None, index: int | None) -> tuple[Any, Any]:
        if index is None or not images or not 0 <= index < len(images):
            raise UserError("no image is open: click one first")
        return images[index][0], gr.update(open=True)

    gallery.select(handler(choose), None, [chosen, button], **UNQUEUED)
    gallery.change(lambda: [None, gr.update(visible=False)], None, [chosen, button], **UNQUEUED)
    button.click(handler(send), [gallery, chosen], [fields.file, fields.accordion], api_name="send", **PRIVATE)


def fill_mask(position: int) -> str:
    """The script of the button: the input at this position is what was painted."""
    return f"(...values) => {{ values[{position}] = window.paintedMask?.() ?? ''; return values; }}"


def start_of(app: App, file: str | None, mask: str | None, strength: float, closely: bool) -> StartImage | None:
    """The image to start from, or ``None``. Raises :class:`UserError` for one that cannot be used."""
    if not file:
        return None
    start = StartImage(Path(file), float(strength))
    if not mask:
        return start
    padding = round(max(start.source.size) * PADDING) if closely else None
    return StartImage(start.path, start.strength, _stored(app, mask), padding)


def _stored(app: App, mask: str) -> Path:
    """The file of a painted mask, in the app's private folder."""
    if not mask.startswith(PREFIX):
        raise UserError("the painted mask did not arrive: paint it again")
    try:
        image = decode(base64.b64decode(mask.removeprefix(PREFIX), validate=True), ("PNG",))
    except ValueError as error:
        raise UserError("the painted mask did not arrive: paint it again") from error
    if max(image.size) > SHOWN:
        raise UserError(f"the painted mask has more than {SHOWN} pixels: paint it again")
    content = png(image.convert("L"))
    folder = make_folder(app.scratch / "masks")
    return write_atomic(folder / f"{hashlib.sha256(content).hexdigest()[:16]}.png", content)
