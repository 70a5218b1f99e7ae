"""Runs that share a frozen base walk together: one forward and backward pass over the rows of all of them."""

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
from ...adapters.tuner.mixed_rows import RowPlan, serve_rows
from ...errors import UserError
from ...loaders import delete_adapter
from ...pipelines.components import component, present
from ..run.batches import Batch
from ..run.run import Run
from ..run.steps import Stepper
from ..run.train import TrainResult
from ..signals import Interrupted
from ..step.denoiser import predict

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Member:
    """A subject on its way: the steps done, and their losses."""

    name: str
    stepper: Stepper
    losses: list[float] = field(default_factory=list)
    error: UserError | None = None
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Loss of the step in work, summed over its micro-steps."""

    @property
    def run(self) -> Run:
        return self.stepper.run

    @property
    def done(self) -> int:
        return self.run.first_step + len(self.losses)

    @property
    def through(self) -> bool:
        return self.done >= self.run.last_step

    @property
    def is_due(self) -> bool:
        """Whether something has to happen between this step and the next."""
        return self.error is not None or self.stepper.is_due(self.done)

    @property
    def micro_steps(self) -> int:
        return self.run.config.gradient_accumulation_steps

    @property
    def alone(self) -> bool:
        """Whether it needs passes of its own: something in them is drawn, or its text encoder runs before them."""
        config = self.run.config
        return config.dropout > 0 or samples_rank(config.method) or config.encodes_each_step


class SubjectRows(RowPlan):
    """Which subject's adapter each row of the next pass uses."""

    def __init__(self, adapters: Sequence[str]) -> None:
        super().__init__([{name: 1.0} for name in adapters])
        self._shares: Mapping[int, int] = {}

    def share_out(self, shares: Mapping[int, int]) -> None:
        """Set how many rows of the next pass belong to adapter ``i``, in this order; a single adapter gets all rows."""
        self._shares = shares

    def start(self, rows: int) -> None:
        batch = [index for index, count in self._shares.items() for _ in range(count)]
        if len(self._shares) == 1:
            batch = [*self._shares] * rows
        if len(batch) != rows:
            raise UserError(
                f"a pass has {rows} rows, but its subjects have {len(batch)}: this is a bug, please report it"
            )
        self.assign(batch)


class BatchedTrainer:
    """Walks the runs of several subjects in one pipeline, each by its own optimizer, until all are through.

    With losses ``l_s`` of subjects ``s`` whose trained factors are disjoint, the gradient of ``sum_s l_s`` with respect
    to those of ``s`` is that of ``l_s``: rows of one batch may belong to different subjects. Pictures of one size
    share a pass of at most ``rows_at_once`` rows. Where dropout or a rank is drawn, or the text encoder is trained, a
    subject gets passes of its own, so that it sees the random numbers that it would see alone.
    """

    def __init__(
        self,
        members: Sequence[Member],
        conclude: Callable[[Member], TrainResult],
        rows_at_once: int | None = None,
    ) -> None:
        self.live = list(members)
        self.conclude, self.most = conclude, rows_at_once
        self.results: list[TrainResult] = []
        self.failed: list[str] = []

    def run(self) -> list[TrainResult]:
        """All steps of all subjects. Raises :class:`UserError` at the end for those that failed."""
        total, first = sum(m.run.last_step for m in self.live), sum(m.done for m in self.live)
        title = f"steps of {len(self.live)} subjects"
        with tqdm(total=total, initial=first, desc=title, mininterval=0.5) as self.bar, ExitStack() as stack:
            for member in self.live:
                stack.enter_context(member.stepper.journal)
            with self._served():
                for number, member in enumerate(self.live):
                    self.rows.share_out({number: 1})
                    member.stepper.measure(member.done)
            self._part()
            while self.live:
                with self._served():
                    self._step()
                    while not any(member.is_due for member in self.live):
                        self._step()
                    self._between()
                self._part()
        if self.failed:
            raise UserError(f"{'; '.join(self.failed)}; {len(self.results)} other subjects are trained")
        return self.results

    @contextmanager
    def _served(self) -> Iterator[None]:
        """The time in which the pipeline's layers give each row its subject's adapter."""
        self.rows = SubjectRows([member.run.adapter for member in self.live])
        with ExitStack() as stack:
            for member in self.live:
                for part in present(member.run.pipe) if member is self.live[0] else ():
                    stack.enter_context(serve_rows(component(member.run.pipe, part), self.rows))
                # Whoever puts an adapter in or takes one out sets the flags of the others.
                for parameter in member.run.parameters.values():
                    parameter.requires_grad_(True)
            yield

    def _step(self) -> None:
        """One step of everybody."""
        begun = time.monotonic()
        rates = [member.run.schedule.get_last_lr()[0] for member in self.live]
        for member in self.live:
            member.run.optimizer.zero_grad(set_to_none=True)
            member.total = torch.zeros((), device=member.run.plan.device)
        for micro in range(max(member.micro_steps for member in self.live)):
            self._micro_step(micro)
        for member, rate in zip(self.live, rates, strict=True):
            try:
                loss, norm = member.stepper.updates.apply(member.done, member.total)
            except UserError as error:
                member.error = error
                continue
            member.losses.append(loss)
            member.stepper.journal.record(member.done, loss, rate, norm, time.monotonic() - begun)
            self.bar.update()

    def _micro_step(self, micro: int) -> None:
        groups: dict[Any, list[tuple[int, Batch]]] = {}
        for number, member in enumerate(self.live):
            if micro >= member.micro_steps:
                continue
            self.rows.share_out({number: 1})
            if member.alone:
                self._backward({member: member.stepper.loss(member.done, micro)})
            else:
                batch = member.stepper.batches.draw(member.done, micro)
                groups.setdefault(kind_of(batch), []).append((number, batch))
        for group in groups.values():
            for some in portions(group, self.most):
                self._pass(some)

    def _pass(self, batches: Sequence[tuple[int, Batch]]) -> None:
        """Forward and backward over the batches of several subjects as one."""
        owners = {number: self.live[number] for number, _ in batches}
        sizes = [len(batch.noisy) for _, batch in batches]
        self.rows.share_out(dict(zip(owners, sizes, strict=True)))
        first = owners[batches[0][0]].stepper
        with first.batches.autocast():
            prediction = predict(first.run.pipe, *joined([batch for _, batch in batches]))
        parts = prediction.split(sizes)
        self._backward(
            {
                member: member.stepper.batches.mean_loss(batch, part)
                for member, (_, batch), part in zip(owners.values(), batches, parts, strict=True)
            }
        )

    def _backward(self, losses: Mapping[Member, Tensor]) -> None:
        shares = {member: loss / member.micro_steps for member, loss in losses.items()}
        torch.autograd.backward([member.run.scaler.scale(loss) for member, loss in shares.items()])
        for member, loss in shares.items():
            member.total += loss.detach()

    def _between(self) -> None:
        """Checkpoints and samples that are due. Raises :class:`Interrupted` when everybody has saved."""
        stops = self._look_after(self.live)
        if stops:  # the signal may have come when the first ones had been looked after
            stops |= self._look_after([m for m in self.live if m not in stops and not m.through])
            saved = next(iter(stops.values()))
            place = saved.checkpoint.parents[2] if saved.checkpoint else None
            raise Interrupted(saved.exit_code - 128, saved.step, place)

    def _look_after(self, members: Sequence[Member]) -> dict[Member, Interrupted]:
        stops = {}
        for number, member in enumerate(self.live):
            if member in members and member.error is None and member.is_due:
                self.rows.share_out({number: 1})
                try:
                    member.stepper.between(member.done)
                except Interrupted as stop:
                    stops[member] = stop
                except UserError as error:
                    member.error = error
        return stops

    def _part(self) -> None:
        """Write the adapters of those that are through; they and those that failed leave the pipeline."""
        for member in [member for member in self.live if member.through or member.error]:
            if member.error is None:
                self._conclude(member)
            if member.error is not None:
                log.warning("%s failed, the others go on: %s", member.name, member.error)
                member.stepper.folder.state("failed", message=str(member.error))
                self.failed.append(f"{member.name}: {member.error}")
            self.live.remove(member)
            delete_adapter(member.run.pipe, member.run.adapter)

    def _conclude(self, member: Member) -> None:
        try:
            self.results.append(self.conclude(member))
        except UserError as error:  # a full disk, an upload that fails
            member.error = error


def kind_of(batch: Batch) -> Any:
    """Batches of one kind can be joined."""
    embeddings = {name: value.shape[1:] for name, value in batch.embeddings.items()}
    return batch.noisy.shape[1:], batch.noisy.dtype, tuple(embeddings.items()), batch.labels is None


def joined(batches: Sequence[Batch]) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]:
    """What :func:`.denoiser.predict` takes, for all these batches as one."""
    embeddings = {name: torch.cat([batch.embeddings[name] for batch in batches]) for name in batches[0].embeddings}
    labels = [batch.labels for batch in batches if batch.labels is not None]
    noisy, times = torch.cat([batch.noisy for batch in batches]), torch.cat([batch.times for batch in batches])
    return noisy, times, embeddings, torch.cat(labels) if labels else None


def portions(batches: Sequence[tuple[int, Batch]], most: int | None) -> Iterator[list[tuple[int, Batch]]]:
    """Consecutive batches of together at most ``most`` rows; a larger one goes alone."""
    portion: list[tuple[int, Batch]] = []
    rows = 0
    for number, batch in batches:
        if portion and most is not None and rows + len(batch.noisy) > most:
            yield portion
            portion, rows = [], 0
        portion.append((number, batch))
        rows += len(batch.noisy)
    yield portion
