"""A server under every kind of load for some minutes: whether its memory stays flat, and each request gets an answer.

    python benchmarks/serving_soak.py [--minutes 5] [--subjects 200] [--clients 16] [--threads 2] [--base FOLDER_OR_ID]

Each client makes pictures, leaves in the middle of streams, attaches adapters, uploads and deletes subjects, and sends
what is refused. Prints memory (RSS) by time, the answers by status, and at last whether the second half of the run took
more memory than the first, after a warm-up of a fifth of the time. Exits with 1 for an answer of 500 or more.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from serving import STEPS, Server, write_subjects

FILE = "nora_adapter.safetensors"
Memory = list[tuple[float, float]]
"""MiB by seconds."""


@contextmanager
def serving(args: argparse.Namespace, folder: Path) -> Iterator[Server]:
    """`nora-diffusion serve` with uploads, in a process of its own."""
    code = "from nora_diffusion.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--uploads", str(folder / "uploads")]
    command += ["--subjects", str(folder / "all.nora_pack.safetensors"), *(["--base", args.base] if args.base else [])]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = next(word.rstrip(";") for word in line.split() if word.startswith("http"))
        yield Server(url, process.pid, "all#")
        process.terminate()


class Client:
    """One of the clients; ``answers`` counts what all of them got."""

    def __init__(self, number: int, server: Server, folder: Path, subjects: int, answers: Counter[str]) -> None:
        self.name, self.server, self.subjects, self.answers = f"up{number}", server, subjects, answers
        self.draw = random.Random(number)
        self.file = (folder / "nora" / f"s{number % min(subjects, 50)}" / FILE).read_bytes()

    async def run(self, until: float) -> None:
        """Send requests until the time."""
        kinds = {self.picture: 12, self.leave: 3, self.attach: 2, self.upload: 1, self.refused: 2}
        async with httpx.AsyncClient(base_url=self.server.url, timeout=600) as http:
            while time.monotonic() < until:
                (kind,) = self.draw.choices(list(kinds), list(kinds.values()))
                await kind(http)

    def body(self, **others: Any) -> dict[str, Any]:
        """A request of one of the subjects."""
        name = f"all#s{int(self.subjects * self.draw.random() ** 2)}"
        steps, seed = self.draw.choice(STEPS), self.draw.randrange(10**6)
        return {"prompt": "a red car", "subjects": {name: 1}, "steps": steps, "guidance": 5, "seed": seed, **others}

    async def picture(self, http: httpx.AsyncClient) -> None:
        """Make a picture."""
        self._count("picture", await http.post("v1/pictures", json=self.body(format="webp")))

    async def leave(self, http: httpx.AsyncClient) -> None:
        """Close a stream after some of its lines."""
        body = self.body(stream=True, previews=2, count=2)
        async with http.stream("POST", "v1/pictures", json=body) as answer:
            left = self.draw.randrange(2, 20)
            async for _ in answer.aiter_lines():
                left -= 1
                if left < 0:
                    break
        self._count("stream left", answer)

    async def attach(self, http: httpx.AsyncClient) -> None:
        """Send an adapter with a request."""
        own = {"own": base64.b64encode(self.file).decode()}
        self._count("attached", await http.post("v1/pictures", json=self.body(adapters=own, subjects={"own": 0.5})))

    async def upload(self, http: httpx.AsyncClient) -> None:
        """Upload a subject, use it, and delete it."""
        self._count("upload", await http.put(f"v1/subjects/{self.name}", content=self.file))
        self._count("picture", await http.post("v1/pictures", json=self.body(subjects={self.name: 1})))
        self._count("delete", await http.delete(f"v1/subjects/{self.name}"))

    async def refused(self, http: httpx.AsyncClient) -> None:
        """Send what is refused."""
        wrong = {"steps": 10**9, "subjects": {"nobody": 1}, "prompt": "", "width": 17, "sampler": "best"}
        name, value = self.draw.choice(list(wrong.items()))
        self._count("refused", await http.post("v1/pictures", json=self.body(**{name: value})))

    def _count(self, kind: str, answer: httpx.Response) -> None:
        self.answers[f"{kind} {answer.status_code}"] += 1


async def soak(
    server: Server, args: argparse.Namespace, folder: Path
) -> tuple[list[tuple[float, float]], Counter[str]]:
    """Memory by time, and the answers."""
    answers, started, memory = Counter[str](), time.monotonic(), Memory()
    until = started + 60 * args.minutes
    clients = [Client(i, server, folder, args.subjects, answers) for i in range(args.clients)]
    tasks = [asyncio.ensure_future(client.run(until)) for client in clients]
    while time.monotonic() < until:
        memory.append((time.monotonic() - started, server.memory))
        await asyncio.sleep(2)
    await asyncio.gather(*tasks)
    return memory, answers


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--subjects", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--base")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_subjects(args.base, args.subjects, folder)
        with serving(args, folder) as server:
            memory, answers = asyncio.run(soak(server, args, folder))
    for seconds, value in memory[:: max(1, len(memory) // 20)]:
        print(f"{seconds:6.0f} s {value:8.0f} MiB")
    print("; ".join(f"{kind}: {count}" for kind, count in sorted(answers.items())))
    warm = [value for seconds, value in memory if seconds > 12 * args.minutes]
    halves = warm[: len(warm) // 2], warm[len(warm) // 2 :]
    first, second = (max(half) for half in halves)
    print(f"largest memory after the warm-up: first half {first:.0f} MiB, second half {second:.0f} MiB")
    failed = sum(count for kind, count in answers.items() if kind.split()[-1].startswith("5"))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
