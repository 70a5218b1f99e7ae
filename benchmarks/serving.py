"""Load on a server of many subjects: pictures a minute, latencies and memory, beside diffusers and PEFT.

    python benchmarks/serving.py [--subjects 1000] [--pictures 128] [--in_flight 16] [--rate 60 ...]
        [--ways diffusers hotswap peft engine engine-mor engine-lora] [--threads 2]
        [--dtype fp32] [--base FOLDER_OR_ID]

Each way is a server in a process of its own with the same HTTP side (`benchmarks/serving_peers.py`), on the loopback
interface. Subjects follow Zipf's law, steps are 8, 12 or 16. Two loads, after a warm-up with other seeds:

- *full*: so many requests in flight at any time; pictures a minute, and seconds until the answer;
- *rate*: requests at random times (Poisson), so many a minute on average, however fast the server is.

Memory is the server's (RSS) at the start, after the warm-up and at the end. The subjects are NoRA adapters in one pack
for the engine, and the same adapters exported as LoRAs for the peers (50 different ones under so many names).
*engine-lora* serves those LoRA files by the engine, *engine-mor* mixtures of ranks. At last, pictures of the engine are
compared with those of a pipeline that loads each adapter with `load_adapter`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from nora_diffusion import add_adapter, create_pack, export_lora, load_adapter, mor, nora, open_pipeline, save_adapter
from nora_diffusion.generation.sampling import sample_images
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.loaders import delete_adapter, trainable_parameters

DIFFERENT = 50
STEPS = (8, 12, 16)
PROMPT, GUIDANCE = "a red car", 5.0


def write_subjects(base: str | None, count: int, folder: Path) -> None:
    """Random NoRA adapters in one basis, weak enough that rounding does not become another picture."""
    pipe = open_pipeline(base)
    for number in range(min(count, DIFFERENT)):
        for method, config in (("nora", nora(basis="svd")), ("mor", mor(r=4, num_experts=4))):
            torch.manual_seed(number)
            add_adapter(pipe, config, "subject")
            for parameter in trainable_parameters(pipe, "subject").values():
                parameter.data.normal_(std=0.05)
            save_adapter(pipe, folder / method / f"s{number}", "subject")
            delete_adapter(pipe, "subject")
        export_lora(folder / "nora" / f"s{number}", folder / "different" / f"{number}.safetensors")
    create_pack(folder / "all.nora_pack.safetensors", {f"s{i}": adapter(folder, i) for i in range(count)})
    (folder / "lora").mkdir()
    (folder / "mixtures").mkdir()
    for i in range(count):
        (folder / "mixtures" / f"s{i}").symlink_to(folder / "mor" / f"s{i % DIFFERENT}")
        (folder / "lora" / f"s{i}.safetensors").symlink_to(folder / "different" / f"{i % DIFFERENT}.safetensors")


def adapter(folder: Path, number: int) -> Path:
    """The adapter of a subject."""
    return folder / "nora" / f"s{number % DIFFERENT}"


@dataclass(frozen=True)
class Ask:
    """A request of the load."""

    subject: int
    steps: int
    seed: int


def asks(subjects: int, count: int, seed: int) -> list[Ask]:
    """Requests for subjects by Zipf's law: the k-th most popular one is asked for 1 / k as often as the first."""
    draw = random.Random(seed)
    popular = random.Random(0).sample(range(subjects), subjects)
    names = draw.choices(popular, [1 / (rank + 1) for rank in range(subjects)], k=count)
    return [Ask(name, draw.choice(STEPS), 1000 * seed + i) for i, name in enumerate(names)]


class Server:
    """A running server, and its memory."""

    def __init__(self, url: str, pid: int, prefix: str) -> None:
        self.url, self.pid, self.prefix = url, pid, prefix

    @property
    def memory(self) -> float:
        """MiB of its process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def body(self, ask: Ask) -> dict[str, Any]:
        """The JSON of a request."""
        name = f"{self.prefix}s{ask.subject}"
        return {"prompt": PROMPT, "subjects": {name: 1}, "steps": ask.steps, "guidance": GUIDANCE, "seed": ask.seed}


@contextmanager
def serving(way: str, args: argparse.Namespace, folder: Path) -> Iterator[Server]:
    """A server in a process of its own."""
    subjects = folder / {"engine": "all.nora_pack.safetensors", "engine-mor": "mixtures"}.get(way, "lora")
    server, _, _ = way.partition("-")
    command = [sys.executable, str(Path(__file__).with_name("serving_peers.py")), server, str(subjects)]
    command += ["--dtype", args.dtype, "--at_once", str(args.in_flight), *(["--base", args.base] if args.base else [])]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True
    ) as process:
        assert process.stdout is not None
        yield Server(process.stdout.readline().strip(), process.pid, "all#" if way == "engine" else "")
        process.communicate()


Answer = tuple[Ask, float, bytes]
"""A request, the seconds until its answer, and the picture's file."""


async def _one(client: httpx.AsyncClient, server: Server, ask: Ask) -> Answer:
    started = time.perf_counter()
    answer = await client.post(f"{server.url}v1/pictures", json=server.body(ask))
    answer.raise_for_status()
    return ask, time.perf_counter() - started, base64.b64decode(answer.json()["pictures"][0]["b64"])


async def full_load(server: Server, todo: Sequence[Ask], in_flight: int) -> tuple[float, list[Answer]]:
    """Keep so many requests in flight; seconds in all, and the answers."""
    left, answers = iter(todo), list[Answer]()
    async with httpx.AsyncClient(timeout=600) as client:

        async def work() -> None:
            for ask in left:
                answers.append(await _one(client, server, ask))

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(in_flight)))
        return time.perf_counter() - started, answers


async def at_rate(server: Server, todo: Sequence[Ask], per_minute: float) -> list[Answer]:
    """Send requests at the times of a Poisson process."""
    draw, now, tasks = random.Random(1), 0.0, []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        started = time.perf_counter()
        for ask in todo:
            now += draw.expovariate(per_minute / 60)
            await asyncio.sleep(max(0.0, started + now - time.perf_counter()))
            tasks.append(asyncio.ensure_future(_one(client, server, ask)))
        return list(await asyncio.gather(*tasks))


def latencies(answers: Sequence[Answer]) -> str:
    """p50, p95, p99 of all answers, and p99 of those with the fewest steps, as cells of a table."""
    seconds = [answer[1] for answer in answers]
    small = [answer[1] for answer in answers if answer[0].steps == min(STEPS)]
    return f"{_quantile(seconds, 50)} | {_quantile(seconds, 95)} | {_quantile(seconds, 99)} | {_quantile(small, 99)}"


def _quantile(values: Sequence[float], percent: int) -> str:
    return f"{float(np.percentile(values, percent)):.2f}"


def measure(way: str, args: argparse.Namespace, folder: Path) -> tuple[float, list[Answer]]:
    """Print the rows of one way. Returns pictures a minute under full load, and the answers."""
    with serving(way, args, folder) as server:
        memory = [server.memory]
        asyncio.run(full_load(server, asks(args.subjects, args.warmup, 1), args.in_flight))
        memory.append(server.memory)
        seconds, answers = asyncio.run(full_load(server, asks(args.subjects, args.pictures, 2), args.in_flight))
        minute = 60 * args.pictures / seconds
        print(f"| {way} | {args.in_flight} in flight | {minute:.0f} | {latencies(answers)} | ", end="", flush=True)
        at_rates = [
            (rate, asyncio.run(at_rate(server, asks(args.subjects, args.pictures, 3), rate))) for rate in args.rate
        ]
        memory.append(server.memory)
        print(f"{' / '.join(f'{value:.0f}' for value in memory)} |", flush=True)
        for rate, found in at_rates:
            print(f"| {way} | {rate:.0f} a minute | | {latencies(found)} | |", flush=True)
        return minute, answers


def compare(answers: Sequence[Answer], args: argparse.Namespace, folder: Path) -> None:
    """Print how many gray levels pictures differ at most from those of a pipeline with one adapter at a time."""
    torch.set_num_threads(args.threads)
    pipe, most = open_pipeline(args.base, args.dtype), 0.0
    pipe.set_progress_bar_config(disable=True)
    for ask, _, data in itertools.islice(answers, args.compared):
        load_adapter(pipe, adapter(folder, ask.subject), "subject")
        (alone,) = sample_images(pipe, [PROMPT], [ask.seed], Sampling(ask.steps, GUIDANCE))
        delete_adapter(pipe, "subject")
        ours = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float)
        most = max(most, float(np.abs(ours - np.asarray(alone, float)).max()))
    print(f"\n{args.compared} pictures of the engine differ from runs of their own by {most:.0f} gray levels at most")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=64)
    parser.add_argument("--in_flight", type=int, default=16)
    parser.add_argument("--rate", type=float, nargs="*", default=[])
    parser.add_argument("--ways", nargs="+", default=["diffusers", "hotswap", "peft", "engine"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compared", type=int, default=16)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--base")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_subjects(args.base, args.subjects, folder)
        print(f"{args.subjects} subjects, {args.pictures} pictures, {args.threads} threads, {args.dtype}\n")
        print("| | load | a minute | p50 | p95 | p99 | p99, 8 steps | MiB |\n|" + " --- |" * 8)
        speeds = {}
        for way in args.ways:
            speeds[way], answers = measure(way, args, folder)
            if way == "engine" and args.compared:
                compare(answers, args, folder)
        slowest = speeds.get("diffusers")
        if slowest:
            print("ratios to diffusers: " + ", ".join(f"{way} {value / slowest:.2f}" for way, value in speeds.items()))


if __name__ == "__main__":
    main()
