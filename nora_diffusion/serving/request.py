"""What an engine is asked for. Needs no torch, so that it is checked at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import UserError, quoted
from ..generation.settings import MAX_SEED, Sampling, check_prompt, check_range
from ..generation.tags import Tag, parse_tags
from ..generation.tags import check_range as check_weight

MAX_COUNT = 16
MAX_SUBJECTS = 8
MAX_PRIORITY = 10
MAX_TIMEOUT = 24 * 3600.0


@dataclass(frozen=True)
class Request:
    """Pictures of a prompt, which may name subjects by ``<lora:name:0.8>`` tags.

    ``subjects``: more of them, with their weights. ``seed``: of the first picture; each further one has the next.
    ``client``: whose request it is, for a fair order. ``priority``: among the requests of a client, higher ones go
    first. ``timeout``: seconds until the pictures are worthless. ``adapters``: files of subjects of this request alone,
    by name; weight 1 if nothing names them. Raises :class:`UserError` for a value out of range.
    """

    prompt: str
    sampling: Sampling
    subjects: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    count: int = 1
    client: str = ""
    priority: int = 0
    timeout: float | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        self.sampling.check()
        check_range("count", self.count, 1, MAX_COUNT)
        check_range("seed", self.seed, 0, MAX_SEED - self.count)
        check_range("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if self.timeout is not None:
            check_range("timeout", self.timeout, 0.001, MAX_TIMEOUT)
        if not self.text.strip():
            raise UserError(f"there is no prompt besides the tags in {quoted(self.prompt)}")
        if len(self.tags) > MAX_SUBJECTS:
            raise UserError(f"a request has {len(self.tags)} subjects: name at most {MAX_SUBJECTS}")

    @property
    def text(self) -> str:
        """The prompt without its tags."""
        return parse_tags(self.prompt)[0]

    @property
    def tags(self) -> list[Tag]:
        """The subjects, those of the prompt first. Raises :class:`UserError` for a name that is given twice."""
        tags = parse_tags(self.prompt)[1]
        for name, weight in self.subjects.items():
            if any(tag.name == name for tag in tags):
                raise UserError(f"{quoted(name)} is a subject and has a tag in the prompt: give it once")
            tags.append(Tag(name, weight, check_weight(weight, f"the weight of {quoted(name)}")))
        named = {tag.name for tag in tags}
        return tags + [Tag(name) for name in self.adapters if name not in named]
