"""What is refused before anything starts, and what is asked of Ray."""

from __future__ import annotations

import ast
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nora_diffusion import serving
from nora_diffusion.cli import main
from nora_diffusion.errors import UserError
from nora_diffusion.generation.library import list_library
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.serving.cluster.deployment import NAME, Deployment, deployed
from nora_diffusion.serving.cluster.front import Front
from nora_diffusion.serving.cluster.replica import ReplicaSettings
from nora_diffusion.serving.cluster.scale import Scale
from nora_diffusion.serving.http import engines
from nora_diffusion.serving.http.catalog import Catalog
from nora_diffusion.serving.http.config import ServeConfig
from nora_diffusion.serving.http.engines import portable
from nora_diffusion.serving.http.state import State

SETTINGS = ReplicaSettings(BaseSource(), 4, 8, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"replicas": "2"}, "--replicas and --address are for --engine ray"),
        ({"address": "auto"}, "--replicas and --address are for --engine ray"),
        ({"engine": "ray", "replicas": "many"}, "--replicas 'many': give a number"),
        ({"engine": "ray", "source": BaseSource("nowhere/at/all")}, "nowhere/at/all"),
    ],
)
def test_wrong_flags(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ServeConfig(**flags).check()


def test_a_machine_that_has_not_the_device_may_lead_others() -> None:
    ServeConfig(BaseSource(device="cuda:7"), engine="ray").check()


def test_without_ray_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "--engine", "ray", "--port", "0"]) == 2
    assert "error: --engine ray needs Ray Serve: pip install 'nora-diffusion[serve,ray]'" in capsys.readouterr().err


def test_the_local_engine_does_not_import_ray() -> None:
    importing = [
        path.name
        for path in (Path(serving.__file__).parent).rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if "import ray" in (line := ast.unparse(node)) or line.startswith("from ray")
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert importing == ["router.py"]


def test_paths_are_absolute_and_links_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "current").symlink_to("one")
    config = portable(ServeConfig(BaseSource("current"), ["out"], uploads="up"))
    assert config.source.base == str(tmp_path / "current")
    assert (config.subjects, config.uploads) == ([str(tmp_path / "out")], str(tmp_path / "up"))
    assert portable(ServeConfig(BaseSource("org/name"))).source.base == "org/name"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a signal of POSIX")
def test_a_hangup_renews_replicas_only(monkeypatch: pytest.MonkeyPatch) -> None:
    renewed: list[Any] = []
    ended = threading.Event()
    monkeypatch.setattr(engines, "renew", lambda state: (renewed.append(state), ended.set()))
    before = signal.getsignal(signal.SIGHUP)
    state: Any = SimpleNamespace(config=ServeConfig(engine="ray"))
    with engines.renewed_on_hangup(state):
        os.kill(os.getpid(), signal.SIGHUP)
        assert ended.wait(10)
    assert renewed == [state] and signal.getsignal(signal.SIGHUP) == before
    local: Any = SimpleNamespace(config=ServeConfig())
    with engines.renewed_on_hangup(local):
        assert signal.getsignal(signal.SIGHUP) == before


def test_a_renewal_that_fails_is_logged(tiny_base: Path, library: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise UserError("no such weights")

    front: Any = Front(SimpleNamespace(renew=fails), list_library(library))  # type: ignore[arg-type]
    state = State(ServeConfig(subjects=[str(library)], engine="ray"), front, Catalog([str(library)]))
    subjects = front.subjects
    engines.renew(state)
    assert "the replicas were not replaced: no such weights" in caplog.text and front.subjects is subjects
    front._replicas.renew = lambda: None
    (library / "bird.safetensors").write_bytes((library / "dog" / "nora_adapter.safetensors").read_bytes())
    engines.renew(state)
    (library / "bird.safetensors").unlink()
    assert "bird" in state.catalog.subjects and len(front.subjects.paths) == 4


class Cluster:
    """As much of Ray as a deployment asks for. ``have``: its resources."""

    def __init__(self, **have: float) -> None:
        self.have, self.given = have, dict[str, Any]()
        self.exceptions = SimpleNamespace(RayServeException=RuntimeError)
        self.message = ""

    def cluster_resources(self) -> dict[str, float]:
        return self.have

    def deployment(self, kind: type, **given: Any) -> Any:
        self.given = given
        return SimpleNamespace(bind=lambda settings: settings)

    def run(self, application: ReplicaSettings, **given: Any) -> None:
        if application.source.base:
            raise RuntimeError("Deploying failed:\nOSError: no such weights")

    def status(self) -> Any:
        replica = SimpleNamespace(message=self.message)
        return SimpleNamespace(applications={NAME: SimpleNamespace(deployments={"Replica": replica})})


def deployment(cluster: Cluster, scale: Scale, settings: ReplicaSettings = SETTINGS) -> Deployment:
    return Deployment(cluster, cluster, settings, scale, 30.0)


def test_replicas_that_have_no_room_are_refused() -> None:
    with pytest.raises(UserError, match="4 replicas need a core each and this machine has 2: use fewer --replicas"):
        deployment(Cluster(CPU=2.0), Scale(1, 4)).check_resources()
    with pytest.raises(UserError, match="4 replicas need a GPU each and this machine has 1"):
        deployment(Cluster(CPU=8.0, GPU=1.0), Scale(4, 4)).check_resources()
    deployment(Cluster(CPU=4.0), Scale(4, 4)).check_resources()


@pytest.mark.parametrize(("device", "gpus"), [(None, 1), ("cuda", 1), ("cpu", 0)])
def test_a_replica_has_a_gpu_unless_it_runs_elsewhere(device: str | None, gpus: int) -> None:
    cluster = Cluster(CPU=2.0, GPU=2.0)
    deployment(cluster, Scale(2, 2), ReplicaSettings(BaseSource(device=device), 4, 8, 0)).renew()
    assert cluster.given["ray_actor_options"] == {"num_cpus": 1, "num_gpus": gpus}
    assert cluster.given["num_replicas"] == 2 and "autoscaling_config" not in cluster.given
    assert cluster.given["max_ongoing_requests"] > 4


def test_the_number_of_replicas_follows_the_load() -> None:
    cluster = Cluster(CPU=2.0)
    deployment(cluster, Scale(1, 4)).renew()
    scaling = cluster.given["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (1, 4, 3.0)
    assert "num_replicas" not in cluster.given


def test_replicas_that_do_not_start_are_a_sentence(tiny_base: Path) -> None:
    settings = ReplicaSettings(BaseSource(str(tiny_base)), 4, 8, 0)
    cluster = Cluster(CPU=2.0)
    with pytest.raises(UserError, match=r"^the replicas did not start: OSError: no such weights$"):
        deployment(cluster, Scale(1, 1), settings).renew()
    cluster.message = (
        "The replica failed to start 2 times:\nTraceback ...\nnora_diffusion.errors.UserError: x is empty\n"
    )
    with pytest.raises(UserError, match=r"^the replicas did not start: x is empty$"):
        deployment(cluster, Scale(1, 1), settings).renew()


def test_a_cluster_that_is_not_there_is_a_sentence() -> None:
    pytest.importorskip("ray.serve")
    with (
        pytest.raises(UserError, match="no Ray cluster at --address nowhere"),
        deployed(SETTINGS, Scale(1, 1), "nowhere", 1.0),
    ):
        pass
