"""Rounds of clients and a server: what travels, who is left out, and how it continues."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factories import write_photos
from fake_ray import RayOfClients
from runs import Configure, assert_equal_tensors
from safetensors.torch import load_file

from nora_diffusion import UserError, load_adapter
from nora_diffusion.formats.adapter_file import inspect_adapter
from nora_diffusion.formats.keys import is_frozen
from nora_diffusion.pipelines.base import open_pipeline
from nora_diffusion.training import train
from nora_diffusion.training.federated import client
from nora_diffusion.training.federated.command import main
from nora_diffusion.training.federated.factors import aggregated, split
from nora_diffusion.training.federated.report import report
from nora_diffusion.training.federated.server import federate
from nora_diffusion.training.federated.settings import Federation
from nora_diffusion.training.signals import Interrupted

NAMES = {"home": 2, "office": 3}
FILE = "nora_adapter.safetensors"
Build = Callable[..., Federation]


@pytest.fixture
def build(configure: Configure, tmp_path: Path) -> Build:
    """``build(rounds=..., aggregation=..., key=value)``: a federation of two clients, two local steps a round."""
    entries = [
        {"name": name, "instance_data_dir": str(write_photos(tmp_path / name, count, seed=count)),
         "instance_prompt": "a photo of sks dog"}
        for name, count in NAMES.items()
    ]  # fmt: skip
    listing = tmp_path / "clients.yaml"
    listing.write_text(yaml.safe_dump(entries))

    def federation(rounds: int = 2, aggregation: Any = "fair", **changes: Any) -> Federation:
        values = {"instance_data_dir": None, "instance_prompt": None, "max_train_steps": 2, **changes}
        return Federation(str(listing), configure(**values), rounds, aggregation)

    return federation


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RayOfClients]:
    def fake(**options: Any) -> RayOfClients:
        found = RayOfClients(**options)
        monkeypatch.setitem(sys.modules, "ray", found)
        return found

    return fake


def test_a_round_is_local_training_and_a_weighted_aggregation(
    build: Build, ray: Callable[..., RayOfClients], tmp_path: Path, tiny_base: Path
) -> None:
    fake = ray()
    federation = build()
    state = federate(federation)
    folder = tmp_path / "run"
    assert len(fake.started) == 4
    start = split(folder / "rounds/round-1")
    updates = []
    for number, name in enumerate(NAMES):  # the second round, as separate runs from the adapter of the first
        settings = {**fake.started[2 + number][0], "output_dir": str(tmp_path / f"alone-{name}")}
        config = federation.training.from_mapping({k: v for k, v in settings.items() if v is not None})
        config.start_from = str(folder / "rounds/round-1")
        updates.append(split(train(config).adapter_path).trained)
    expected, error = aggregated(updates, [2 / 5, 3 / 5], "fair")
    found = split(folder / "rounds/round-2")
    assert all(torch.equal(value, expected[key]) for key, value in found.trained.items())
    assert all(torch.equal(value, start.frozen[key]) for key, value in found.frozen.items())
    assert_equal_tensors(folder / FILE, folder / "rounds/round-2" / FILE)
    assert state.rounds[1].error == pytest.approx(error) and error > 0
    info = inspect_adapter(folder)
    assert (info.trigger, info.class_word, info.step) == ("sks", "dog", 4)
    assert info.prompts == ["a photo of sks dog"]
    assert info.extra["federated"] == {"clients": 2, "aggregation": "fair"}
    load_adapter(open_pipeline(tiny_base), folder)


@pytest.mark.parametrize(
    "changes", [{}, {"method": "lora", "inner_rank": None, "basis": None}, {"method": "nora_input"}]
)
def test_only_trained_factors_travel(
    build: Build, ray: Callable[..., RayOfClients], tmp_path: Path, changes: dict[str, Any]
) -> None:
    fake = ray()
    state = federate(build(1, **changes))
    tensors = load_file(tmp_path / "run" / FILE)
    trained = sum(value.nbytes for key, value in tensors.items() if not is_frozen(key))
    frozen = sum(value.nbytes for key, value in tensors.items() if is_frozen(key))
    headers = 200 * len(tensors)
    assert 2 * trained < state.rounds[0].up_bytes < 2 * (trained + headers)
    assert state.rounds[0].down_bytes == state.rounds[0].up_bytes
    assert frozen <= state.basis_bytes < frozen + headers
    for _, info, basis, factors, _ in fake.started:
        assert len(basis) == state.basis_bytes and len(factors) == state.rounds[0].down_bytes // 2
        assert "instance_data_dir" not in info
    text = report(state)
    assert "| 1 |" in text and "loss of office" in text


def test_a_client_that_dies_is_left_out_and_joins_again(
    build: Build, ray: Callable[..., RayOfClients], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ray(dies={1})
    with caplog.at_level("WARNING", "nora_diffusion"):
        state = federate(build())
    assert [sorted(each.losses) for each in state.rounds] == [["office"], ["home", "office"]]
    assert state.rounds[0].left_out == {"home": "its process died"}
    assert "home is left out of round 1" in caplog.text
    assert state.rounds[0].error == pytest.approx(0, abs=1e-6)
    assert "round 1: home was left out: its process died" in (tmp_path / "run/report.md").read_text()


def test_a_client_whose_photos_are_gone_does_not_stop_the_others(
    build: Build, ray: Callable[..., RayOfClients], tmp_path: Path
) -> None:
    ray()
    federation = build(1)
    for photo in (tmp_path / "home").iterdir():
        photo.unlink()
    state = federate(federation)
    assert list(state.rounds[0].losses) == ["office"]
    assert "home" in state.rounds[0].left_out


def test_without_any_client_the_round_fails_and_can_be_tried_again(
    build: Build, ray: Callable[..., RayOfClients], tmp_path: Path
) -> None:
    ray(dies={3, 4})
    with pytest.raises(UserError, match="no client finished round 2"):
        federate(build())
    assert not (tmp_path / "run" / FILE).exists()
    whole = build(output_dir=str(tmp_path / "whole"))
    ray()
    federate(build())
    ray()
    federate(whole)
    assert_equal_tensors(tmp_path / "run" / FILE, tmp_path / "whole" / FILE)


def test_it_stops_after_a_signal_and_continues_with_more_rounds(
    build: Build, ray: Callable[..., RayOfClients], tmp_path: Path
) -> None:
    fake = ray(stop_at=3)
    with pytest.raises(Interrupted) as stopped:
        federate(build())
    assert (stopped.value.step, fake.canceled) == (1, {3, 4})
    ray()
    assert len(federate(build(3)).rounds) == 3
    ray()
    federate(build(3, output_dir=str(tmp_path / "whole")))
    assert_equal_tensors(tmp_path / "run" / FILE, tmp_path / "whole" / FILE)


def test_another_federation_is_refused(build: Build, ray: Callable[..., RayOfClients], tmp_path: Path) -> None:
    ray()
    federate(build(1))
    with pytest.raises(UserError, match=r"other settings \(aggregation\)"):
        federate(build(1, "average"))
    with pytest.raises(UserError, match=r"other settings \(learning_rate\)"):
        federate(build(1, learning_rate=1e-3))
    (tmp_path / "run/federation.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        federate(build(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "--rounds 0 is too few"),
        ({"method": "mor", "inner_rank": None, "basis": None}, "use --aggregation average"),
        ({"method": "melora", "inner_rank": None, "basis": None, "blocks": 2}, "use --aggregation average"),
        ({"method": "dylora", "inner_rank": None, "basis": None, "aggregation": "exact"}, "use fair or average"),
        ({"rank_allocation": "gradient"}, "--rank_allocation is not possible"),
        ({"strategy": "reslora", "shortcut": "input"}, "--strategy reslora changes the ranks"),
        ({"calibration": "subject", "basis": "awsvd"}, "--calibration is not possible"),
    ],
)
def test_what_cannot_be_averaged_is_refused(build: Build, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        federate(build(**changes))


def test_clients_must_agree_in_the_adapter(build: Build, tmp_path: Path) -> None:
    federation = build()
    listing = Path(federation.clients)
    entries = yaml.safe_load(listing.read_text())
    entries[1]["inner_rank"] = 1
    listing.write_text(yaml.safe_dump(entries))
    with pytest.raises(UserError, match="inner_rank must be the same for all clients"):
        federate(federation)


def test_the_command(
    build: Build, ray: Callable[..., RayOfClients], tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ray()
    words = [
        "--clients", build().clients, "--rounds", "1", "--aggregation", "average", "--method", "lora", "--rank", "2",
        "--max-train-steps", "1", "--seed", "3", "--pretrained_model_name_or_path", str(tiny_base),
        "--mixed_precision", "no", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(words) == 0
    assert "loss of home" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/federation.json").read_text())["seed"] == 3
    assert main([*words, "--rnak", "2"]) == 2
    assert "rank" in capsys.readouterr().err
    assert main(["--rounds", "1"]) == 2


@pytest.fixture
def two_workers() -> Iterator[Any]:
    """A real Ray on this machine that runs two tasks at a time."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[3])])
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_a_killed_process_is_left_out_of_its_round_only(
    two_workers: Any, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a real Ray: SIGKILL of one of two clients in its first round."""
    body = client.train_round

    def dying(settings: Any, *rest: Any) -> client.Update:
        import os

        from nora_diffusion.training.run.journal import Journal

        original, killed = Journal.record, Path(settings["output_dir"]).parents[2] / "killed"

        def record(self: Any, done: int, *values: Any) -> None:
            original(self, done, *values)
            if self.folder.path.parent.name == "home" and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.record = record  # type: ignore[method-assign]
        try:
            return body(settings, *rest)
        finally:
            Journal.record = original  # type: ignore[method-assign]

    monkeypatch.setattr(client, "train_round", dying)
    state = federate(build(2))
    assert [sorted(each.losses) for each in state.rounds] == [["office"], ["home", "office"]]
    assert state.rounds[0].left_out == {"home": "its process died"}
    assert (tmp_path / "run/killed").exists()
