"""Methods of a pipeline and its scheduler, wrapped for the time of a call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def noise_in_fp32(pipe: Any) -> Iterator[None]:
    """Draw the noise of a pipeline in fp32, then round it to the dtype of the models.

    torch before 2.12 draws other numbers in half precision, so that a seed would give another image. This is the noise
    at the start and, of an ancestral scheduler, that of each step.
    """
    with _wrapped(pipe, "prepare_latents", _drawing_in_fp32), _wrapped(pipe.scheduler, "step", _drawing_in_fp32):
        yield


@contextmanager
def predictions(scheduler: Any) -> Iterator[list[Any]]:
    """A list that holds the last step's ``pred_original_sample``, which pipelines drop (``return_dict=False``)."""
    predicted: list[Any] = []

    def recording(step: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **{**kwargs, "return_dict": True})
            clean = getattr(result, "pred_original_sample", None)
            predicted[:] = [] if clean is None else [clean]
            return (result.prev_sample,)

        return record

    with _wrapped(scheduler, "step", recording):
        yield predicted


@contextmanager
def _wrapped(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace a method of an instance by ``wrap(method)``, then put back what the instance had."""
    method, own = getattr(owner, name), vars(owner).get(name)
    setattr(owner, name, functools.wraps(method)(wrap(method)))  # pipelines inspect the signature
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _drawing_in_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
    def draw(*args: Any, **kwargs: Any) -> Any:
        with _Fp32Draws():  # not around the models: a compiled graph would depend on it
            return method(*args, **kwargs)

    return draw


class _Fp32Draws(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype = kwargs.get("dtype")
        if func is torch.randn and dtype in (torch.float16, torch.bfloat16):
            return func(*args, **{**kwargs, "dtype": torch.float32}).to(dtype)
        return func(*args, **kwargs)
