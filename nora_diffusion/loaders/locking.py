"""One lock per pipeline: functions that change its adapters run one at a time."""

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
PipelineFunction: TypeAlias = Callable[Concatenate[Any, P], R]

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@contextmanager
def exclusive(pipe: Any) -> Iterator[None]:
    """``with exclusive(pipe): set_adapters(pipe, "dog"); pipe(...)``: no other thread changes the adapters meanwhile.

    All functions of this toolkit that change a pipeline, and ``mixed_batch``, take this lock; a plain call of the
    pipeline does not. The lock is reentrant, and pipelines with the same denoiser share it.
    """
    with _lock_of(denoiser(pipe)):
        yield


def one_at_a_time(function: PipelineFunction[P, R]) -> PipelineFunction[P, R]:
    """Decorator: run a function whose first argument is a pipeline inside :func:`exclusive`."""

    @functools.wraps(function)
    def locked(pipe: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        with exclusive(pipe):
            return function(pipe, *args, **kwargs)

    return cast("PipelineFunction[P, R]", locked)


def _lock_of(module: nn.Module) -> threading.RLock:
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(module, threading.RLock())
