"""One thread at a time: what changes a pipeline's adapters, and calls that rely on them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import nn

from ..pipelines.components import denoiser

P = ParamSpec("P")
R = TypeVar("R")
Verb: TypeAlias = Callable[Concatenate[Any, P], R]

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_NEW_LOCK = threading.Lock()


@contextmanager
def exclusive(pipe: Any) -> Iterator[None]:
    """``with exclusive(pipe): set_adapters(pipe, "dog"); pipe(...)``: meanwhile no other thread changes its adapters.

    All verbs of this toolkit that change a pipeline, and ``mixed_batch``, wait here for each other; a plain call of the
    pipeline does not. May be nested. Pipelines that share their denoiser share the lock.
    """
    with _lock_of(denoiser(pipe)):
        yield


def one_at_a_time(verb: Verb[P, R]) -> Verb[P, R]:
    """Have a verb whose first argument is a pipeline hold :func:`exclusive`."""

    @functools.wraps(verb)
    def alone(pipe: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        with exclusive(pipe):
            return verb(pipe, *args, **kwargs)

    return cast("Verb[P, R]", alone)


def _lock_of(module: nn.Module) -> threading.RLock:
    with _NEW_LOCK:
        return _LOCKS.setdefault(module, threading.RLock())
