"""Small pictures of what a step predicts, for streams. They cost the engine nothing: a linear map, not the decoder."""

from __future__ import annotations

import base64
import io
import logging

from ...generation.latent_preview import LatentPreview
from ...generation.settings import Sampling
from ..tickets import Event
from .state import State

log = logging.getLogger(__name__)
QUALITY = 80


class Previews:
    """The previews of one stream: one after every ``every`` steps of each picture, none after its last step.

    Steps that a slow reader missed count as well, so that it does not wait for a multiple of ``every``.
    """

    def __init__(self, state: State, every: int, sampling: Sampling) -> None:
        self._state, self._every = state, every
        self._ratio = sampling.width / sampling.height if sampling.width and sampling.height else 1.0
        self._shown: dict[int, int] = {}

    def of(self, event: Event) -> dict[str, str]:
        """``preview`` of a step as a JPEG in base64, if one is due. One that fails must not cost the picture."""
        due = self._every and event.step >= self._shown.get(event.index, 0) + self._every
        if not due or event.step == event.steps or (preview := self._state.preview) is None:
            return {}
        self._shown[event.index] = event.step
        try:
            return {"preview": base64.b64encode(_jpeg(preview, event, self._ratio)).decode()}
        except Exception:
            log.debug("no preview", exc_info=True)  # latents of an unknown form
            return {}


def _jpeg(preview: LatentPreview, event: Event, ratio: float) -> bytes:
    buffer = io.BytesIO()
    preview.image(event.latents[0], ratio).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
