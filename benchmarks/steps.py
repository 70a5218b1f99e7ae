"""Training step, its memory, and inference with live adapters, beside PEFT's LoRA and LyCORIS in the same process.

    python benchmarks/steps.py [--part train] [--channels 128,256,512,512] [--side 32] [--batch 2] [--rounds 5]
                               [--device cpu] [--only "NoRA,PEFT LoRA r 32"]

The model is a UNet of SD 1.5's layout with random bf16 weights, under bf16 autocast; the default widths make it small
(142 M parameters), ``--channels 320,640,1280,1280 --side 64 --batch 1`` makes it SD 1.5 at 512 px. Adapters are on all
attention projections. Every round runs all variants in turn, and the first row before and after each of them; the ratio
is the median over the rounds of a variant's time divided by the mean of these two, so that a machine that slows down
for a while slows both. Times are CPU times of one thread on a CPU, wall-clock times on a GPU.

- *training step*: forward, backward and no optimizer. The first row, the frozen floor, computes the gradient of the
  activations only. *MiB above the floor*: what autograd keeps for backward beside parameters and buffers.
  LyCORIS needs ``pip install "nora-diffusion[bench]"``; without it, its rows are missing.
- *inference*: one pass without gradients, with 1 to 32 adapters live, each at weight 1. *one basis*: the adapters share
  their frozen outer pair; *own bases*: each has another.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn

from nora_diffusion.adapters import AdapterConfig, NoraLayer, lora, moe_lora, mor, nora
from nora_diffusion.adapters.config import Start
from nora_diffusion.attention import AdapterAttnProcessor
from nora_diffusion.pipelines.router_inputs import connect, router_input_width
from nora_diffusion.training.step.memory import saved_storages

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
Model = Callable[[], nn.Module]


class Bench:
    """The base, one fixed input, and the ways to adapt and run it."""

    def __init__(self, channels: list[int], side: int, batch: int, device: str) -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        unet: Any = UNet2DConditionModel(
            sample_size=side, block_out_channels=tuple(channels), cross_attention_dim=768, attention_head_dim=8
        )
        self.base: nn.Module = unet.to(self.device, torch.bfloat16).requires_grad_(False)
        half: dict[str, Any] = {"device": self.device, "dtype": torch.bfloat16}
        self.sample, self.states = torch.randn(batch, 4, side, side, **half), torch.randn(batch, 77, 768, **half)
        self.timesteps = torch.arange(10, 10 + batch, device=self.device)
        self.target = torch.randn(batch, 4, side, side, device=self.device)

    def plain(self) -> nn.Module:
        """A copy that shares the frozen weights."""
        return copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})

    def adapted(self, config: PeftConfig, count: int = 1) -> nn.Module:
        """A copy with ``count`` live adapters; trained factors in fp32, as in mixed precision."""
        model, names = self.plain(), [f"a{i}" for i in range(count)]
        for name in names:
            one = copy.deepcopy(config)
            if isinstance(one, AdapterConfig):
                one.start = Start(condition=router_input_width(model, one.router))
            inject_adapter_in_model(one, model, name)
        for module in model.modules():
            if hasattr(module, "nora_delta") or hasattr(module, "lora_A"):
                module.set_adapter(names)  # type: ignore[operator]
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        connect(model)
        return model.to(self.device)

    def in_one_basis(self, config: AdapterConfig, count: int) -> nn.Module:
        """As :meth:`adapted`, with the first adapter's outer pair in all of them."""
        model = self.adapted(config, count)
        for layer in (module for module in model.modules() if isinstance(module, NoraLayer)):
            first: Any = layer.delta("a0")
            for i in range(1, count):
                delta: Any = layer.delta(f"a{i}")
                delta.A_out, delta.B_out = first.A_out, first.B_out
        return model

    def with_lycoris(self, algo: str, rank: int) -> nn.Module:
        """A copy with LyCORIS modules on the same layers; trained factors in fp32."""
        from lycoris import LycorisNetwork, create_lycoris

        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        names = [rf".*attn[12]\.{name}$" for name in TARGETS]
        LycorisNetwork.apply_preset({"target_module": [], "use_fnmatch": False, "target_name": names})
        model: Any = self.plain()
        network = create_lycoris(model, 1.0, linear_dim=rank, linear_alpha=rank, algo=algo)
        network.apply_to()
        model.lycoris = network.to(self.device, torch.float32)
        return model

    def prepared(self, config: AdapterConfig, count: int) -> nn.Module:
        """As :meth:`in_one_basis`, with layers as ``prepare_for_compile`` leaves them."""
        model = self.in_one_basis(config, count)
        for path, layer in model.named_modules():
            if isinstance(layer, NoraLayer):
                layer.prepare(path, config.r)
        return model

    def forward(self, model: Any, sample: Tensor) -> Tensor:
        """The prediction under autocast."""
        with torch.autocast(self.device.type, torch.bfloat16):
            prediction: Tensor = model(sample, self.timesteps, self.states).sample
        return prediction

    def train_step(self, model: nn.Module, sample: Tensor) -> None:
        """Forward, loss and backward."""
        (self.forward(model, sample).float() - self.target).pow(2).mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    def kept(self, model: nn.Module, sample: Tensor) -> float:
        """MiB that a forward pass keeps for backward, beside parameters and buffers."""
        with saved_storages((*model.parameters(), *model.buffers())) as saved:
            self.forward(model, sample)
        return sum(storage.nbytes() for storage in saved.values()) / 2**20

    def seconds(self, work: Callable[[], Any]) -> float:
        """The time of one call, on this bench's clock."""
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        start = clock()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start


def training_variants(bench: Bench) -> dict[str, Model]:
    """The models of the first table, made when they are asked for."""
    own = {"basis": "orthogonal", "target_modules": TARGETS}
    configs: dict[str, PeftConfig] = {
        "PEFT LoRA r 4": LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS),
        "PEFT LoRA r 32": LoraConfig(r=32, lora_alpha=32, target_modules=TARGETS),
        "NoRA r 32, r' 4": nora(r=32, inner_r=4, **own),  # type: ignore[arg-type]
        "NoRA r 64, r' 15": nora(r=64, inner_r=15, **own),  # type: ignore[arg-type]
        "LoRA r 32": lora(r=32, target_modules=TARGETS),
        "MoR r 32, 8 experts, token router": mor(r=32, num_experts=8, target_modules=TARGETS),
        "MoR r 32, 8 experts, prompt router": mor(r=32, num_experts=8, router="prompt", target_modules=TARGETS),
        "MoR r 32, 8 experts, timestep router": mor(r=32, num_experts=8, router="timestep", target_modules=TARGETS),
        "MoE-LoRA r 4, 8 experts": moe_lora(r=4, num_experts=8, target_modules=TARGETS),
    }
    models: dict[str, Model] = {n: partial(bench.adapted, c) for n, c in configs.items()}
    if importlib.util.find_spec("lycoris"):
        models |= {f"LyCORIS {algo} r 32": partial(bench.with_lycoris, algo, 32) for algo in ("LoRA", "LoKr")}
    return {"frozen floor": bench.plain, **models}


def inference_variants(bench: Bench) -> dict[str, Model]:
    """The models of the second table."""
    config = nora(r=32, inner_r=4, basis="orthogonal", target_modules=TARGETS)
    peer = LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS)
    models: dict[str, Model] = {"base": bench.plain}
    for count in (1, 3, 8, 32):
        models[f"PEFT LoRA r 4, {count} live"] = partial(bench.adapted, peer, count)
        models[f"LoRA r 4, {count} live"] = partial(bench.adapted, lora(r=4, target_modules=TARGETS), count)
        models[f"NoRA, own bases, {count} live"] = partial(bench.adapted, config, count)
        models[f"NoRA, one basis, {count} live"] = partial(bench.in_one_basis, config, count)
        models[f"NoRA, one basis, prepared, {count} live"] = partial(bench.prepared, config, count)

    def processor() -> nn.Module:
        model: Any = bench.adapted(config)
        model.set_attn_processor(AdapterAttnProcessor())
        return model

    return {**models, "NoRA, attention processor, 1 live": processor}


def ratios(bench: Bench, runs: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[float, dict[str, float]]:
    """Median seconds of the first run, and the median ratio of each to the firsts around it; one round warms up."""
    (base, first), *others = runs.items()
    found: dict[str, list[float]] = {name: [] for name in runs}
    firsts: list[float] = []
    for number in range(rounds + 1):
        before = bench.seconds(first)
        for name, run in others:
            elapsed, after = bench.seconds(run), bench.seconds(first)
            if number:
                found[name].append(2 * elapsed / (before + after))
                firsts.append(after)
            before = after
    medians = {name: statistics.median(values) for name, values in found.items() if values}
    return statistics.median(firsts), {base: 1.0, **medians}


def train_table(bench: Bench, models: Mapping[str, nn.Module], rounds: int) -> None:
    """Print the table of training steps."""
    floor = next(iter(models))
    sample = bench.sample.clone().requires_grad_()  # or the floor would have no backward pass
    for model in models.values():
        model.train()
    kept = {name: bench.kept(model, sample) for name, model in models.items()}
    runs = {name: partial(bench.train_step, models[name], sample) for name in models}
    seconds, found = ratios(bench, runs, rounds)
    print(
        f"\n| training step (floor {seconds:.2f} s) | x floor | MiB above the floor | trained |\n" + "| --- " * 4 + "|"
    )
    for name, model in models.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"| {name} | {found[name]:.3f} | {kept[name] - kept[floor]:.1f} | {trained:,} |")


def inference_table(bench: Bench, models: Mapping[str, nn.Module], rounds: int) -> None:
    """Print the table of passes without gradients."""
    for model in models.values():
        model.eval().requires_grad_(False)
    with torch.no_grad():
        runs = {name: partial(bench.forward, model, bench.sample) for name, model in models.items()}
        seconds, found = ratios(bench, runs, rounds)
    print(f"\n| inference (base {seconds:.2f} s) | x base |\n| --- | --- |")
    for name in models:
        print(f"| {name} | {found[name]:.3f} |")


def main() -> None:
    """Print both tables, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["train", "inference", "both"], default="both")
    parser.add_argument("--channels", default="128,256,512,512")
    for flag, value in {"side": 32, "batch": 2, "rounds": 5, "threads": 1}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    parser.add_argument("--only", default="", help="parts of the names of rows, by comma; the first row always runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    torch.set_num_threads(args.threads)
    bench = Bench([int(n) for n in args.channels.split(",")], args.side, args.batch, args.device)
    millions = sum(p.numel() for p in bench.base.parameters()) / 1e6
    print(f"UNet of {millions:.0f} M parameters, batch {args.batch}, {args.side}x{args.side} latents, {args.device}")
    tables = {"train": (training_variants, train_table), "inference": (inference_variants, inference_table)}
    for part, (variants, table) in tables.items():
        if args.part in (part, "both"):
            makers = variants(bench)
            wanted = [
                n for i, n in enumerate(makers) if not i or not args.only or any(o in n for o in args.only.split(","))
            ]
            table(bench, {name: makers[name]() for name in wanted}, args.rounds)


if __name__ == "__main__":
    main()
