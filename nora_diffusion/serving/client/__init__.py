"""A client of ``nora-diffusion serve``, for programs that have no device of their own. Needs httpx, and no torch.

::

    with Client("https://pictures.example", key) as client:
        for event in client.stream(prompt="a sks mug <lora:mug> in the snow", seed=1):
            if isinstance(event, Made):
                event.image.save(f"{event.index}.png")

Whatever goes wrong is a :class:`.failures.ServerError`, a sentence. Leaving the loop cancels the request. All answers
are bounded, and checked before they are used.
"""

from .address import KEY_VARIABLE, check_address, read_key
from .client import Client
from .events import Event, Failed, Made, Queued, Step
from .failures import ServerError
from .values import About, Subject

__all__ = [
    "KEY_VARIABLE", "About", "Client", "Event", "Failed", "Made", "Queued", "ServerError", "Step", "Subject",
    "check_address", "read_key",
]  # fmt: skip
