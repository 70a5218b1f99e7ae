"""The server of a federated training: it sends the factors, waits for the clients, and averages what they send."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError, last_line
from ...formats.adapter_info import AdapterInfo, dump_info
from ...formats.model_card import write_card
from ...io.files import FileLock, make_folder, write_atomic
from ..many.cluster import ray_cluster
from ..settings.config import TrainConfig
from ..signals import Interrupted, StopRequests
from ..step.seeds import derive
from .settings import Federation
from .state import Round, State, read_state, write_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...io.tensors import Tensors
    from .client import Update
    from .factors import Split

log = logging.getLogger(__name__)

LOCK, ROUNDS, CLIENTS = ".lock", "rounds", "clients"
POLL_SECONDS = 0.5


def federate(federation: Federation) -> State:
    """Train all rounds that are missing; the adapter is in the federation's folder, with those of all rounds.

    A client whose process dies, or whose training fails, is left out of the round and asked again in the next one.
    Raises :class:`UserError` for a user's mistake, if the folder holds another federation, or if no client finishes a
    round; :class:`.signals.Interrupted` after SIGINT or SIGTERM. The finished rounds are kept.
    """
    configs = federation.configs()
    folder = make_folder(federation.folder)
    with _locked(folder), StopRequests() as stop:
        state = read_state(federation, configs)
        server = Server(federation, configs, state)
        with ray_cluster(federation.address, "nora-diffusion federate") as ray:
            while len(state.rounds) < federation.rounds:
                server.train_round(ray, stop)
        server.finish()
    return state


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK)
    if not lock.try_acquire():
        raise UserError(f"another federation runs in {folder}: wait for it, or choose another --output_dir")
    try:
        yield
    finally:
        lock.release()


def _describe(info: AdapterInfo, words: Sequence[Mapping[str, Any]]) -> None:
    """Set the words of an adapter's metadata to those of the clients."""
    for name in ("trigger", "class_word", "license"):
        setattr(info, name, ", ".join(dict.fromkeys(own[name] for own in words if own[name])))
    info.instance_prompt = words[0]["instance_prompt"]
    info.prompts = list(dict.fromkeys(prompt for own in words for prompt in own["prompts"]))


class Server:
    """Runs the rounds of a federation; its state is written after each of them."""

    def __init__(self, federation: Federation, configs: Mapping[str, TrainConfig], state: State) -> None:
        self.federation, self.configs, self.state = federation, configs, state
        self._basis: Any = None
        """The frozen factors in Ray's store, which sends them once to each machine."""

    @property
    def folder(self) -> Path:
        """The folder of the federation."""
        return self.federation.folder

    def adapter(self, number: int) -> Path:
        """The folder of the adapter after a round; 0: before the first."""
        return self.folder / ROUNDS / f"round-{number}"

    def train_round(self, ray: Any, stop: StopRequests) -> None:
        """One round: send, wait, aggregate, save."""
        from .factors import aggregated, join, packed, split, unpacked

        number = len(self.state.rounds) + 1
        if number == 1:
            self._start()
        current = split(self.adapter(number - 1))
        stop.check()
        if self._basis is None:
            frozen = packed(current.frozen)
            self.state.basis_bytes, self._basis = len(frozen), ray.put(frozen)
        sent = packed(current.trained)
        result = Round()
        received: dict[str, Tensors] = {}
        photos: dict[str, int] = {}
        words: list[Mapping[str, Any]] = []
        for name, update in self._updates(ray, stop, number, current.info, sent).items():
            try:
                if update.error:
                    raise UserError(update.error)
                received[name] = unpacked(update.factors, current.trained, name)
            except UserError as error:
                log.warning("%s is left out of round %d: %s", name, number, error)
                result.left_out[name] = str(error)
                continue
            photos[name], result.losses[name] = update.photos, update.loss
            words.append(update.words)
            result.up_bytes += len(update.factors)
            result.down_bytes += len(sent)
        if not received:
            reasons = "; ".join(f"{name}: {text}" for name, text in result.left_out.items())
            raise UserError(f"no client finished round {number} ({reasons}): the same command tries it again")
        weights = [photos[name] / sum(photos.values()) for name in received]
        factors, result.error = aggregated([*received.values()], weights, self.federation.aggregation)
        _describe(current.info, words)
        current.info.step += self.configs[next(iter(received))].max_train_steps or 0
        join(self.adapter(number), current.info, current.frozen, factors)
        self.state.rounds.append(result)
        write_state(self.folder, self.state)
        log.info(
            "round %d of %d: %d clients, mean loss %.4f", number, self.federation.rounds, len(received), result.loss
        )

    def _updates(self, ray: Any, stop: StopRequests, number: int, info: AdapterInfo, sent: bytes) -> dict[str, Update]:
        """What each client sends in a round; raises :class:`Interrupted` after a signal."""
        from .client import Update, train_round

        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(train_round)
        running = {
            task.remote(self._settings(name, number), dump_info(info), self._basis, sent, str(Path.cwd())): name
            for name in self.configs
        }
        found: dict[str, Update] = {}
        while running:
            for done in ray.wait(list(running), timeout=POLL_SECONDS)[0]:
                try:
                    update = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    update = Update(error=last_line(error))
                except ray.exceptions.RayError:
                    update = Update(error="its process died")
                found[running.pop(done)] = update
            if stop.received:
                for left in running:
                    ray.cancel(left, force=True)
                raise Interrupted(stop.received, len(self.state.rounds), None)
        return {name: found[name] for name in self.configs}  # sums do not depend on who was first

    def _settings(self, name: str, number: int) -> dict[str, Any]:
        """The settings of a client's training in a round: with a seed of its own, in a folder that it writes anew."""
        config = replace(
            self.configs[name],
            seed=derive(self.state.seed, "federated", name, number) % 2**31,
            output_dir=str(self.folder / CLIENTS / name / "run"),
            overwrite_output_dir=True,
            checkpoints_total_limit=1,
            basis_from=None,
            calibration_prompts=None,
        )
        return config.to_dict(secrets=True)

    def _start(self) -> None:
        """The adapter before the first round: that of a new run, on the base's own statistics."""
        import torch

        from ...loaders import save_adapter
        from ...pipelines.base import best_device
        from ..planning.adapter import adapted_components, add_seeded_adapter
        from ..planning.opening import open_base, opening_dtype
        from ..step.randomness import forked

        facts = {"clients": len(self.configs), "aggregation": self.federation.aggregation}
        config = replace(next(iter(self.configs.values())), seed=self.state.seed)
        device = torch.device(best_device())
        with forked(device):
            pipe = open_base(config, device, opening_dtype([config], device))
            add_seeded_adapter(config, pipe, adapted_components(config, pipe), "start")
            save_adapter(pipe, self.adapter(0), "start", info={"seed": self.state.seed, "extra": {"federated": facts}})

    def finish(self) -> None:
        """Write the adapter of the last round, its model card and the report."""
        from ...formats.adapter_file import inspect_adapter
        from .factors import join, split
        from .report import report

        last: Split = split(self.adapter(len(self.state.rounds)))
        file = join(self.folder, last.info, last.frozen, last.trained)
        text = report(self.state)
        write_card(self.folder, inspect_adapter(file), f"## Training of {len(self.configs)} clients\n\n{text}")
        write_atomic(self.folder / "report.md", text)
