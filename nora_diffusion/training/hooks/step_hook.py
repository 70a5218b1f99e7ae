"""Hooks around a training step: the interface, and several of them as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import ClassVar

from torch import Tensor

from ...formats.adapter_writing import Contents

PREFIX = "hook:"
"""Start of the keys of hooks in the tensors of a checkpoint."""
State = dict[str, Tensor]


class StepHook:
    """What one feature does around the optimizer steps of a run; each method does nothing unless it is overridden.

    A step is: :meth:`before_step`; for each micro-step a forward and a backward pass inside :meth:`around_pass`, with
    :meth:`penalty` added to the loss; :meth:`after_backward`, when the gradients have been averaged over processes and
    unscaled, but not yet clipped; the optimizer; :meth:`after_step`, unless the step was skipped (fp16 overflow).
    Everything random depends on the run's seed and the step only, so that a resumed run continues bit for bit.
    """

    name: ClassVar[str]
    """Names its state in checkpoints."""
    needs_own_pass: ClassVar[bool] = False
    """Whether the subject cannot share forward passes with others that train at the same time."""

    def start(self) -> None:
        """Called once, before the first step of a new run. A resumed run calls :meth:`load_state` instead."""

    def before_step(self, step: int) -> None:
        """Called before the passes of a step."""

    @contextmanager
    def around_pass(self, step: int) -> Iterator[None]:
        """A context around each forward and backward pass.

        It covers the draw of the batch as well, in which text encoders in training run, and the base without adapters
        for its own predictions: the layers have ``disable_adapters`` set then.
        """
        yield

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """A context in which the adapter acts as the saved one will, for samples and validation."""
        yield

    def penalty(self, step: int) -> Tensor | None:
        """A term that is added to the loss of each micro-step; called after its forward pass."""
        return None

    def after_backward(self, step: int) -> None:
        """Called with the gradients of the step; may read and change them."""

    def after_step(self, step: int) -> None:
        """Called after the parameters were updated."""

    def state(self) -> State:
        """What a checkpoint must hold to continue, besides the trained parameters and the optimizer's state."""
        return {}

    def load_state(self, state: State) -> None:
        """Continue from :meth:`state`; its tensors are on the CPU."""

    def finish(self, contents: Contents) -> Contents:
        """What the saved adapter holds, from what was trained."""
        return contents


class Hooks:
    """The hooks of a run, in order."""

    def __init__(self, hooks: Sequence[StepHook] = ()) -> None:
        self.hooks = list(hooks)

    @property
    def need_own_pass(self) -> bool:
        """Whether any hook cannot share passes with other subjects."""
        return any(hook.needs_own_pass for hook in self.hooks)

    def start(self) -> None:
        """See :meth:`StepHook.start`."""
        for hook in self.hooks:
            hook.start()

    def before_step(self, step: int) -> None:
        """See :meth:`StepHook.before_step`."""
        for hook in self.hooks:
            hook.before_step(step)

    @contextmanager
    def around_pass(self, step: int) -> Iterator[None]:
        """See :meth:`StepHook.around_pass`."""
        with ExitStack() as stack:
            for hook in self.hooks:
                stack.enter_context(hook.around_pass(step))
            yield

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """See :meth:`StepHook.as_saved`."""
        with ExitStack() as stack:
            for hook in self.hooks:
                stack.enter_context(hook.as_saved())
            yield

    def with_penalties(self, loss: Tensor, step: int, share: float) -> Tensor:
        """``loss`` plus this share of each penalty: a step has several micro-steps."""
        for hook in self.hooks:
            penalty = hook.penalty(step)
            if penalty is not None:
                loss = loss + share * penalty
        return loss

    def after_backward(self, step: int) -> None:
        """See :meth:`StepHook.after_backward`."""
        for hook in self.hooks:
            hook.after_backward(step)

    def after_step(self, step: int) -> None:
        """See :meth:`StepHook.after_step`."""
        for hook in self.hooks:
            hook.after_step(step)

    def state(self) -> State:
        """The state of all hooks, by keys that begin with :data:`PREFIX`."""
        return {
            f"{PREFIX}{hook.name}|{key}": value.detach().cpu().contiguous()
            for hook in self.hooks
            for key, value in hook.state().items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state`, found among the tensors of a checkpoint."""
        for hook in self.hooks:
            start = f"{PREFIX}{hook.name}|"
            hook.load_state({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})

    def finish(self, contents: Contents) -> Contents:
        """See :meth:`StepHook.finish`."""
        for hook in self.hooks:
            contents = hook.finish(contents)
        return contents
