"""Train several subjects on one frozen base in batched passes: each row uses the adapter of its subject."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...adapters.presets import samples_rank
from ...adapters.tuner.mixed_rows import serve_rows
from ...adapters.tuner.row_plan import RowPlan
from ...errors import UserError
from ...loaders import delete_adapter
from ...pipelines.components import components
from ..planning.checkpoints import remove
from ..run.batches import Batch
from ..run.run import Run
from ..run.steps import Stepper
from ..run.train import TrainResult
from ..signals import Interrupted
from ..step.denoiser import predict

log = logging.getLogger(__name__)

Failures = dict[str, str]
"""Error messages of the subjects that failed, by name."""


@dataclass(eq=False)
class Member:
    """A subject in training, with the losses of its steps so far."""

    name: str
    stepper: Stepper
    losses: list[float] = field(default_factory=list)
    error: UserError | None = None
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Loss of the current step, summed over its micro-steps."""
    extra: int | None = None
    """Step of a checkpoint that can be deleted, as it was written only because another subject wrote one."""

    @property
    def run(self) -> Run:
        return self.stepper.run

    @property
    def done(self) -> int:
        return self.run.first_step + len(self.losses)

    @property
    def finished(self) -> bool:
        return self.done >= self.run.last_step

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is due before the next step."""
        return self.stepper.saves_at(self.done)

    @property
    def is_due(self) -> bool:
        """Whether work is due before the next step (failure, checkpoint, stop, samples)."""
        stepper = self.stepper
        return self.error is not None or self.saves or stepper.stopped() > 0 or stepper.measures_at(self.done)

    def save(self, together: Sequence[str]) -> None:
        """Write a checkpoint, unless this step has one. ``together``: the subjects that do so at the same step."""
        stepper, earlier = self.stepper, self.stepper.saved_step
        if self.error is None and earlier != self.done:
            try:
                stepper.write_checkpoint(self.done, together)
            except UserError as error:
                self.error = error
            self.extra = earlier if earlier is not None and not stepper.saves_at(earlier) else None

    def prune(self) -> None:
        """Delete the checkpoints that the settings do not keep; call it after all subjects have saved."""
        if self.error is None:
            if self.extra is not None:
                remove(self.stepper.folder.checkpoints / f"step-{self.extra}")
            self.stepper.prune()

    @property
    def micro_steps(self) -> int:
        return self.run.config.gradient_accumulation_steps

    @property
    def needs_own_pass(self) -> bool:
        """Whether it needs a forward pass of its own (dropout, sampled rank, trained text encoder, some strategies)."""
        config = self.run.config
        return (
            config.dropout > 0
            or samples_rank(config.method)
            or config.encodes_each_step
            or self.run.hooks.need_own_pass
        )


class SubjectRows(RowPlan):
    """Assigns the rows of the next pass to the adapters of their subjects."""

    def __init__(self, adapters: Sequence[str]) -> None:
        super().__init__([{name: 1.0} for name in adapters])
        self._counts: Mapping[int, int] = {}

    def set_counts(self, counts: Mapping[int, int]) -> None:
        """Set the number of rows of each adapter index in the next pass, in this order; a single adapter gets all."""
        self._counts = counts

    def start(self, rows: int) -> None:
        batch = [index for index, count in self._counts.items() for _ in range(count)]
        if len(self._counts) == 1:
            batch = [*self._counts] * rows
        if len(batch) != rows:
            raise UserError(
                f"a pass has {rows} rows, but its subjects have {len(batch)} rows: this is a bug, please report it"
            )
        self.assign(batch)


class BatchedTrainer:
    """Trains several subjects in one pipeline, each with its own optimizer, until all are finished.

    The trained parameters of subjects are disjoint. So the gradient of ``sum_s l_s`` with respect to the parameters of
    subject ``s`` is the gradient of ``l_s`` alone, and rows of one batch may belong to different subjects. Images of
    one size share a pass of at most ``rows_at_once`` rows. Subjects with dropout, a sampled rank or a trained text
    encoder get passes of their own, so that they use the same random numbers as in a run of their own.
    """

    def __init__(
        self,
        members: Sequence[Member],
        conclude: Callable[[Member], TrainResult],
        rows_at_once: int | None = None,
        failures: Failures | None = None,
    ) -> None:
        self.live = list(members)
        self.conclude, self.rows_at_once = conclude, rows_at_once
        self.results: list[TrainResult] = []
        self.failures = {} if failures is None else failures

    def run(self) -> list[TrainResult]:
        """Train all steps of all subjects. Raises :class:`UserError` at the end if subjects failed."""
        total, first = sum(m.run.last_step for m in self.live), sum(m.done for m in self.live)
        title = f"steps of {len(self.live)} subjects"
        with tqdm(total=total, initial=first, desc=title, mininterval=0.5) as self.bar, ExitStack() as stack:
            for member in self.live:
                stack.enter_context(member.stepper.journal)
            with self._rows_by_subject():
                for number, member in enumerate(self.live):
                    self.rows.set_counts({number: 1})
                    member.stepper.measure(member.done)
            self._remove_finished()
            while self.live:
                with self._rows_by_subject():
                    self._step()
                    while not any(member.is_due for member in self.live):
                        self._step()
                    self._after_step()
                self._remove_finished()
        if self.failures:
            failed = "; ".join(f"{name}: {message}" for name, message in self.failures.items())
            raise UserError(f"{failed}; {len(self.results)} other subjects were trained")
        return self.results

    @contextmanager
    def _rows_by_subject(self) -> Iterator[None]:
        """Context in which the layers of the pipeline apply to each row the adapter of its subject."""
        self.rows = SubjectRows([member.run.adapter for member in self.live])
        with ExitStack() as stack:
            for member in self.live:
                for module in components(member.run.pipe).values() if member is self.live[0] else ():
                    stack.enter_context(serve_rows(module, self.rows))
                # Adding or deleting an adapter resets requires_grad of the others.
                for parameter in member.run.parameters.values():
                    parameter.requires_grad_(True)
            yield

    def _step(self) -> None:
        """One step of every subject."""
        started = time.monotonic()
        rates = [member.run.schedule.get_last_lr()[0] for member in self.live]
        for number, member in enumerate(self.live):
            self.rows.set_counts({number: 1})  # hooks may run passes of their own
            member.run.optimizer.zero_grad(set_to_none=True)
            member.run.hooks.before_step(member.done)
            member.total = torch.zeros((), device=member.run.plan.device)
        for micro in range(max(member.micro_steps for member in self.live)):
            self._micro_step(micro)
        for number, (member, rate) in enumerate(zip(self.live, rates, strict=True)):
            self.rows.set_counts({number: 1})
            try:
                loss, norm = member.stepper.updates.apply(member.done, member.total)
            except UserError as error:
                member.error = error
                continue
            member.losses.append(loss)
            member.stepper.journal.record(member.done, loss, rate, norm, time.monotonic() - started)
            self.bar.update()

    def _micro_step(self, micro: int) -> None:
        groups: dict[Any, list[tuple[int, Batch]]] = {}
        for number, member in enumerate(self.live):
            if micro >= member.micro_steps:
                continue
            self.rows.set_counts({number: 1})
            if member.needs_own_pass:
                member.total += member.stepper.backward(member.done, micro)
            else:
                batch = member.stepper.batches.draw(member.done, micro)
                groups.setdefault(shape_key(batch), []).append((number, batch))
        for group in groups.values():
            for chunk in chunks(group, self.rows_at_once):
                self._pass(chunk)

    def _pass(self, batches: Sequence[tuple[int, Batch]]) -> None:
        """Forward and backward pass over the concatenated batches of several subjects."""
        owners = {number: self.live[number] for number, _ in batches}
        sizes = [len(batch.noisy) for _, batch in batches]
        self.rows.set_counts(dict(zip(owners, sizes, strict=True)))
        first = owners[batches[0][0]].stepper
        with first.batches.autocast():
            prediction = predict(first.run.pipe, *concatenated([batch for _, batch in batches]))
        predictions = prediction.split(sizes)
        self._backward(
            {
                member: member.stepper.batches.mean_loss(batch, own)
                for member, (_, batch), own in zip(owners.values(), batches, predictions, strict=True)
            }
        )

    def _backward(self, losses: Mapping[Member, Tensor]) -> None:
        shares = {member: member.stepper.share_of(member.done, loss) for member, loss in losses.items()}
        torch.autograd.backward([total for _, total in shares.values()])
        for member, (loss, _) in shares.items():
            member.total += loss

    def _after_step(self) -> None:
        """Do the work that is due for each subject. Raises :class:`Interrupted` after all have saved.

        If one subject saves a checkpoint, all do, so that they can continue together from it: see
        :func:`.checkpoints.steps_to_resume`. So too if one stops early, as the next passes are without its rows.
        """
        stopped = max(member.stepper.stopped() for member in self.live)
        if stopped or any(member.saves for member in self.live if member.error is None):
            self._save()
        goes_on = {member: not member.finished for member in self.live}
        for number, member in enumerate(self.live):
            if member.error is None and not (stopped and goes_on[member]):
                self.rows.set_counts({number: 1})
                member.stepper.measure(member.done)
        if any(goes_on[member] and member.finished for member in self.live):
            self._save()
        if stopped and (unfinished := [member for member in self.live if goes_on[member] and member.error is None]):
            saved = unfinished[0].stepper.saved
            raise Interrupted(stopped, unfinished[0].done, saved.parents[2] if saved else None)

    def _save(self) -> None:
        """Write the checkpoints of all subjects, and only then delete older ones."""
        names = [member.name for member in self.live if member.error is None]
        for member in self.live:
            member.save(names)
        for member in self.live:
            member.prune()

    def _remove_finished(self) -> None:
        """Save the adapters of finished subjects; remove these and failed ones from the pipeline."""
        for member in [member for member in self.live if member.finished or member.error]:
            if member.error is None:
                self._conclude(member)
            if member.error is not None:
                log.warning("%s failed; the other subjects continue: %s", member.name, member.error)
                member.stepper.folder.state("failed", message=str(member.error))
                self.failures[member.name] = str(member.error)
            self.live.remove(member)
            delete_adapter(member.run.pipe, member.run.adapter)

    def _conclude(self, member: Member) -> None:
        try:
            self.results.append(self.conclude(member))
        except UserError as error:  # a full disk, an upload that fails
            member.error = error


def shape_key(batch: Batch) -> Any:
    """Key of batches that can be concatenated: shapes per row, dtype, presence of labels."""
    embeddings = {name: value.shape[1:] for name, value in batch.embeddings.items()}
    return batch.noisy.shape[1:], batch.noisy.dtype, tuple(embeddings.items()), batch.labels is None


def concatenated(batches: Sequence[Batch]) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]:
    """Concatenate batches into the arguments of :func:`.denoiser.predict`."""
    embeddings = {name: torch.cat([batch.embeddings[name] for batch in batches]) for name in batches[0].embeddings}
    labels = [batch.labels for batch in batches if batch.labels is not None]
    noisy, times = torch.cat([batch.noisy for batch in batches]), torch.cat([batch.times for batch in batches])
    return noisy, times, embeddings, torch.cat(labels) if labels else None


def chunks(batches: Sequence[tuple[int, Batch]], max_rows: int | None) -> Iterator[list[tuple[int, Batch]]]:
    """Group consecutive batches into chunks of at most ``max_rows`` rows; a larger batch is a chunk of its own."""
    chunk: list[tuple[int, Batch]] = []
    rows = 0
    for number, batch in batches:
        if chunk and max_rows is not None and rows + len(batch.noisy) > max_rows:
            yield chunk
            chunk, rows = [], 0
        chunk.append((number, batch))
        rows += len(batch.noisy)
    yield chunk
