"""The training loop of all stages: schedule, clipping, EMA, log, exact resume.

All random draws of a step depend on ``(seed, step)`` only. So a state is weights, EMA, optimizer moments and the step:
a safetensors file, written under a temporary name and renamed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import processes
from .configs import StageConfig
from .muon import Muon

LossFn = Callable[[int], tuple[Tensor, dict[str, float]]]
"""Maps a step to its loss and the metrics to log."""


@dataclass
class LoopOptions:
    """Output folder, log and save intervals in steps, and the step to stop at before the last one (None: do not)."""

    out: Path
    log_every: int = 50
    save_every: int = 200
    stop_at: int | None = None


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random generator of one step."""
    return torch.Generator().manual_seed(seed * 7919 + step)


def state_path(out: Path, name: str) -> Path:
    """The file of a stage's training state in the output folder."""
    return out / f"{name}.state.safetensors"


def learning_rate(config: StageConfig, step: int) -> float:
    """Warm-up, constant, then linear decay to zero over the last ``config.decay`` of the steps."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    start = math.floor(config.steps * (1 - config.decay))
    cool = 1.0 if step < start else (config.steps - step) / max(1, config.steps - start)
    return config.lr * warm * cool


# Layers that do not map hidden features to hidden features; AdamW trains them, not Muon.
_NOT_FOR_MUON = ("embedding", "conv_in.", "conv_out.", "patch_embed", "quant_conv", "logit_scale")


def build_optimizers(params: dict[str, nn.Parameter], config: StageConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the hidden matrices and AdamW for the rest."""
    hidden = {k for k, p in params.items() if p.ndim > 1 and not any(name in k for name in _NOT_FOR_MUON)}
    use_muon = config.optimizer == "muon"
    rest = [p for k, p in params.items() if not use_muon or k not in hidden]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    out: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)]
    if use_muon:
        out.append(Muon([p for k, p in params.items() if k in hidden], config.lr, weight_decay=config.weight_decay))
    return out


class Trainer:
    """Trains the parameters of ``module`` and their EMA. Resumes from the state in ``options.out`` if there is one."""

    def __init__(self, name: str, module: nn.Module, config: StageConfig, options: LoopOptions) -> None:
        self.name, self.config, self.options = name, config, options
        self.params = dict(module.named_parameters())
        self.ema = {k: p.detach().clone() for k, p in self.params.items()}
        self.optimizers = build_optimizers(self.params, config)
        self.step = 0
        self._load()

    def run(self, loss_fn: LossFn) -> None:
        """Train to ``config.steps`` (or ``options.stop_at``). Raises FloatingPointError if the loss is not finite."""
        end = min(self.config.steps, self.options.stop_at or self.config.steps)
        total, count, started = 0.0, 0, time.time()
        while self.step < end:
            loss, metrics = loss_fn(self.step)
            self._update(loss)
            total, count = total + loss.item(), count + 1
            self.step += 1
            if self.step % self.options.log_every == 0 or self.step == end:
                mean = total / count
                rate = count * self.config.batch / (time.time() - started)
                self._log(mean, metrics, rate)
                if not math.isfinite(mean):
                    raise FloatingPointError(f"{self.name}: the loss is {mean} at step {self.step}")
                total, count, started = 0.0, 0, time.time()
            if self.step % self.options.save_every == 0 or self.step == end:
                self.save()
                started = time.time()

    def _update(self, loss: Tensor) -> None:
        for p in self.params.values():
            p.grad = None
        loss.backward()
        params = list(self.params.values())
        processes.average(p.grad for p in params)
        nn.utils.clip_grad_norm_(params, self.config.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config, self.step)
            optimizer.step()
        # A faster decay at the start, so that the initial weights leave the average early.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in params], 1 - decay)

    def _log(self, mean: float, metrics: dict[str, float], rate: float) -> None:
        if processes.rank() > 0:
            return
        row = {
            "stage": self.name,
            "step": self.step,
            "loss": round(mean, 5),
            "pictures_per_s": round(rate, 1),
            "lr": learning_rate(self.config, self.step - 1),
            "time": round(time.time()),
            **metrics,
        }
        self.options.out.mkdir(parents=True, exist_ok=True)
        with (self.options.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """Write the state; the file's metadata holds stage and step as JSON."""
        if processes.rank() > 0:
            return
        tensors = {f"model.{k}": p.detach() for k, p in self.params.items()}
        tensors |= {f"ema.{k}": p for k, p in self.ema.items()}
        for key, p in self.params.items():
            for optimizer in self.optimizers:
                tensors |= {f"opt.{moment}.{key}": v for moment, v in optimizer.state.get(p, {}).items()}
        path = state_path(self.options.out, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file(
            {k: v.contiguous().cpu() for k, v in tensors.items()},
            temporary,
            metadata={"state": json.dumps({"stage": self.name, "step": self.step})},
        )
        temporary.replace(path)

    def _load(self) -> None:
        path = state_path(self.options.out, self.name)
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            self.step = int(json.loads(file.metadata()["state"])["step"])
        tensors = load_file(path)
        with torch.no_grad():
            for key, p in self.params.items():
                p.copy_(tensors[f"model.{key}"])
                self.ema[key].copy_(tensors[f"ema.{key}"])
        for name, value in tensors.items():
            if name.startswith("opt."):
                _, moment, key = name.split(".", 2)
                p = self.params[key]
                # In the memory format of the parameter: the rounding of a matrix product depends on it.
                same = value.shape == p.shape
                self._optimizer_of(p).state[p][moment] = (
                    torch.empty_like(p).copy_(value) if same else value.to(p.device)
                )

    def _optimizer_of(self, p: nn.Parameter) -> torch.optim.Optimizer:
        return next(o for o in self.optimizers for g in o.param_groups if any(q is p for q in g["params"]))
