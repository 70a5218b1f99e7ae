"""Time to switch and to load adapters, and diffusers' time for LoRAs of the same layers in the same process.

    python benchmarks/loading.py [--small] [--rounds 7]

The model has the layout of Stable Diffusion 1.5 (UNet and text encoder in bf16, random weights); ``--small``: it is the
embedded base. The adapters are NoRA (r = 32, r' = 4) on the attention projections of both components, the LoRAs their
export of rank 4 and random ones of rank 32. The columns are the median CPU milliseconds of one thread, the ratio to the
first row of the group, and the kilobytes that are read from adapter files (which are in the system's cache):

- *switch*: activate another adapter. Without loaded LoRAs to choose from, one is unloaded and another loaded;
- *pass*: of the UNet, two rows of 8 x 8 latents: the first after a switch, the next, and without adapters;
- *load*: into a pipeline without adapters; *first*: into one whose weights have not been compared with a file yet;
  *beside*: next to another loaded adapter, a NoRA with the same basis.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from nora_diffusion import (
    add_adapter,
    create_pack,
    delete_adapter,
    export_lora,
    load_adapter,
    load_base,
    nora,
    save_adapter,
    set_adapters,
)
from nora_diffusion.adapters import lora
from nora_diffusion.io.tensor_file import TensorFile
from nora_diffusion.loaders import trainable_parameters

R, INNER_R = 32, 4
PACK = "subjects.nora_pack.safetensors"
Work = Callable[[], object]
BYTES = [0]


def sd15() -> Any:
    """A pipeline with the layout of Stable Diffusion 1.5 and random weights in bf16."""
    base = load_base()
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    values = 0.02 * torch.randn(2**20)
    for model in (unet, encoder):
        model.to(torch.bfloat16).to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data = (
                values.bfloat16().repeat(parameter.numel() // 2**20 + 1)[: parameter.numel()].view_as(parameter)
            )
    return StableDiffusionPipeline(
        base.vae, encoder, base.tokenizer, unet, base.scheduler, None, None, requires_safety_checker=False
    )


def write_adapters(pipe: Any, folder: Path) -> None:
    """Two NoRA adapters with one basis, each with its own and with a shared copy, in a pack and as LoRAs; two LoRAs."""
    for i in (0, 1):
        own = folder / f"own-{i}"
        make(pipe, nora(r=R, inner_r=INNER_R, basis="orthogonal"), own, basis_from=folder / "own-0" if i else None)
        save_adapter(pipe, folder / f"shared-{i}", "new", basis="shared")
        export_lora(own, folder / f"lora-{INNER_R}-{i}.safetensors", dtype="bf16")
        make(pipe, lora(r=R), folder / f"wide-{i}")
        export_lora(folder / f"wide-{i}", folder / f"lora-{R}-{i}.safetensors", dtype="bf16")
    create_pack(folder / PACK, [(f"s{i}", folder / f"shared-{i}") for i in (0, 1)])
    delete_adapter(pipe, "new")


def make(pipe: Any, config: Any, target: Path, basis_from: Path | None = None) -> None:
    """Save a random adapter, which stays loaded."""
    if "new" in getattr(pipe.unet, "peft_config", {}):
        delete_adapter(pipe, "new")
    add_adapter(pipe, config, "new", components=["unet", "text_encoder"], basis_from=basis_from)
    for parameter in trainable_parameters(pipe, "new").values():
        parameter.data.normal_(std=0.02)
    save_adapter(pipe, target, "new")


class Table:
    """Measures rows and prints them in groups, with ratios to the first row of each group."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def group(self, title: str) -> None:
        self.title, self.first = title, 0.0

    def row(self, label: str, work: Work, undo: Work = lambda: None, size: int | None = None) -> None:
        """``size``: bytes read, if the work does not read them by our reader."""
        times = []
        for _ in range(self.rounds + 1):
            BYTES[0], start = 0, time.process_time()
            work()
            times.append(1e3 * (time.process_time() - start))
            read = BYTES[0] if size is None else size
            undo()
        median = statistics.median(times[1:])
        self.first = self.first or median
        kilobytes = f"{read / 1000:,.0f}" if read else ""
        print(f"| {self.title} | {label} | {median:.1f} | {median / self.first:.3f} | {kilobytes} |", flush=True)


def measure_loading(table: Table, pipe: Any, folder: Path) -> None:
    table.group("load")
    for rank in (INNER_R, R):
        one, two = (folder / f"lora-{rank}-{i}.safetensors" for i in (0, 1))
        load = lambda one=one: pipe.load_lora_weights(str(one), adapter_name="one")  # noqa: E731
        table.row(f"LoRA r = {rank}, diffusers", load, pipe.unload_lora_weights, one.stat().st_size)
        pipe.load_lora_weights(str(two), adapter_name="two")
        table.row(f"LoRA r = {rank}, diffusers, beside", load, lambda: pipe.delete_adapters("one"), one.stat().st_size)
        pipe.unload_lora_weights()

    def delete() -> None:
        delete_adapter(pipe, "one")

    sources = {"own basis": folder / "own-0", "shared basis": folder / "shared-0", "pack": f"{folder / PACK}#s0"}
    for label, source in sources.items():
        load = lambda source=source: load_adapter(pipe, source, "one")  # type: ignore[misc] # noqa: E731
        table.row(f"NoRA, {label}, first", load, lambda: (delete(), touch(pipe)))
        table.row(f"NoRA, {label}", load, delete)
        load_adapter(pipe, folder / "shared-1", "two")
        table.row(f"NoRA, {label}, beside", load, delete)
        delete_adapter(pipe, "two")


def touch(pipe: Any) -> None:
    """Count a change of every weight, so that the next load computes its fingerprint anew."""
    for module in (pipe.unet, pipe.text_encoder):
        for parameter in module.parameters():
            parameter.detach().flatten()[:1].add_(0)


def measure_switching(table: Table, pipe: Any, folder: Path) -> None:
    names, files = cycle(["one", "two"]), cycle([str(folder / f"lora-{INNER_R}-{i}.safetensors") for i in (0, 1)])

    def reload() -> None:
        pipe.unload_lora_weights()
        pipe.load_lora_weights(next(files), adapter_name="one")

    table.group("switch")
    table.row("unload_lora_weights, load_lora_weights", reload)
    pipe.load_lora_weights(next(files), adapter_name="two")
    table.row("loaded LoRAs, pipe.set_adapters", lambda: pipe.set_adapters(next(names)))
    pipe.unload_lora_weights()
    for i, name in enumerate(("one", "two")):
        load_adapter(pipe, folder / f"own-{i}", name)
    table.row("loaded NoRAs, pipe.set_adapters", lambda: pipe.set_adapters(next(names)))
    table.row("loaded NoRAs, set_adapters", lambda: set_adapters(pipe, next(names)))
    measure_passes(table, pipe, names)


def measure_passes(table: Table, pipe: Any, names: Any) -> None:
    unet = pipe.unet
    x = torch.randn(2, unet.config.in_channels, 8, 8, dtype=unet.dtype)
    states = torch.randn(2, 77, unet.config.cross_attention_dim, dtype=unet.dtype)

    def run() -> None:
        unet(x, 500, states)

    table.group("pass")
    set_adapters(pipe, [])
    table.row("no adapter", run)
    set_adapters(pipe, next(names))
    table.row("NoRA, first after a switch", run, lambda: set_adapters(pipe, next(names)))
    run()
    table.row("NoRA, next", run)


def count_bytes() -> None:
    """Count what passes through our reader."""
    read = TensorFile.read

    def counted(file: TensorFile, start: int, stop: int) -> bytearray:
        BYTES[0] += stop - start
        return read(file, start, stop)

    TensorFile.read = counted  # type: ignore[method-assign]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipe = load_base() if args.small else sd15()
    count_bytes()
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        write_adapters(pipe, Path(temporary))
        print("| | | CPU ms | ratio | KB read |\n| --- | --- | --- | --- | --- |")
        measure_switching(Table(args.rounds), pipe, Path(temporary))
        pipe.unload_lora_weights()
        measure_loading(Table(args.rounds), pipe, Path(temporary))


if __name__ == "__main__":
    main()
