"""Where the pictures of an engine meet: their threads wait for the results of their models.

A picture is made by diffusers' own pipeline, in a thread of its own. The models that it calls are :class:`Shared`: a
call waits here until the engine has computed it, in one batch with those of other pictures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .merging import Arguments


@dataclass(eq=False)
class Call:
    """A waiting call of a picture. ``model``: its name in the pipeline, with the method if that is not ``forward``."""

    picture: Hashable
    model: str
    arguments: Arguments
    result: Any = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def kind(self) -> Hashable:
        """Calls of one kind can share a pass."""
        return self.model, self.arguments.key

    def answer(self, result: Any) -> None:
        """Let the picture go on with a result."""
        self.result = result
        self.done.set()

    def fail(self, error: BaseException) -> None:
        """End the picture: its thread gets the error."""
        self.error = error
        self.done.set()


class Rendezvous:
    """The pictures at work, and the calls that wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pictures: set[Hashable] = set()
        self._calls: list[Call] = []
        self._closed: BaseException | None = None

    def enter(self, picture: Hashable) -> None:
        """Count a picture among those that are waited for."""
        with self._changed:
            self._pictures.add(picture)

    def leave(self, picture: Hashable) -> None:
        """No longer wait for a picture, which has ended."""
        with self._changed:
            self._pictures.discard(picture)
            self._changed.notify_all()

    def call(self, picture: Hashable, model: str, arguments: Arguments) -> Any:
        """Called by a picture's thread: wait for the result. Raises what the engine answers with."""
        call = Call(picture, model, arguments)
        with self._changed:
            if self._closed is not None:
                raise self._closed
            self._calls.append(call)
            if len(self._calls) == len(self._pictures):
                self._changed.notify_all()
        call.done.wait()
        if call.error is not None:
            raise call.error
        return call.result

    def wait(self) -> list[Call]:
        """Called by the engine: wait until no picture computes on its own; all waiting calls, the oldest first."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._calls) == len(self._pictures))
            return list(self._calls)

    def close(self, error: BaseException) -> None:
        """End all pictures: calls that wait get the error, and those that would."""
        with self._changed:
            calls, self._calls, self._closed = self._calls, [], error
        for call in calls:
            call.fail(error)

    def take(self, calls: Iterable[Call]) -> None:
        """Remove calls, which are about to be answered."""
        with self._changed:
            for call in calls:
                self._calls.remove(call)


class Shared:
    """A model as one picture sees it: calls go to the rendezvous, everything else to the model itself.

    Its dtype and device are given: a model looks for them among its modules, which the engine may be changing when a
    picture asks.
    """

    def __init__(self, model: Any, name: str, dtype: Any, device: Any, call: Callable[[str, Arguments], Any]) -> None:
        self._model, self._name, self._call = model, name, call
        self.dtype, self.device = dtype, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._name, Arguments.of(args, kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class SharedAutoencoder(Shared):
    """An autoencoder: its methods are called, not itself."""

    def to(self, *_: Any, **__: Any) -> SharedAutoencoder:
        """Stay as it is: a pipeline that casts it for its own picture would cast it under the others."""
        return self

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        return self._call(f"{self._name}.encode", Arguments.of(args, kwargs))

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        return self._call(f"{self._name}.decode", Arguments.of(args, kwargs))


class Locked:
    """A tokenizer as one picture sees it: those of the tokenizers library cannot be used by two threads at once."""

    def __init__(self, tokenizer: Any, lock: threading.RLock) -> None:
        self._tokenizer, self._lock = tokenizer, lock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return self._tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._tokenizer, name)
        if not callable(value):
            return value

        def locked(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return value(*args, **kwargs)

        return locked
