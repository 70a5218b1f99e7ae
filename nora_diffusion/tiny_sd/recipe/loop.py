"""The training loop that the three stages share: schedule, clipping, EMA, log, exact resume.

Everything random in a step comes from ``(seed, step)``, so a state is only weights, EMA, optimizer moments and
the step number: safetensors and JSON, written to a temporary name and renamed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import processes
from .configs import StageConfig
from .muon import Muon

LossFn = Callable[[int], tuple[Tensor, dict[str, float]]]


@dataclass
class LoopOptions:
    """Where and how often a stage writes: ``out`` folder, log and save intervals in steps, stop for a pause."""

    out: Path
    log_every: int = 50
    save_every: int = 1000
    stop_at: int | None = None


def learning_rate(config: StageConfig, step: int) -> float:
    """Warm-up, constant, then linear decay to zero over the last ``config.decay`` of the steps."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    start = math.floor(config.steps * (1 - config.decay))
    cool = 1.0 if step < start else (config.steps - step) / max(1, config.steps - start)
    return config.lr * warm * cool


# Inputs, outputs and tables are no maps between hidden features: AdamW trains them.
_OUTER = ("embedding", "conv_in.", "conv_out.", "patch_embed", "quant_conv", "logit_scale")


def build_optimizers(params: dict[str, nn.Parameter], config: StageConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the inner matrices and AdamW for the rest."""
    inner = {k for k, p in params.items() if p.ndim > 1 and not any(o in k for o in _OUTER)}
    use_muon = config.optimizer == "muon"
    rest = [p for k, p in params.items() if not use_muon or k not in inner]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    out: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)]
    if use_muon:
        out.append(Muon([p for k, p in params.items() if k in inner], config.lr, weight_decay=config.weight_decay))
    return out


class Trainer:
    """Optimizers with EMA on the parameters of ``module``; ``run`` continues from the state in ``options.out``."""

    def __init__(self, name: str, module: nn.Module, config: StageConfig, options: LoopOptions) -> None:
        self.name, self.config, self.options = name, config, options
        self.params = dict(module.named_parameters())
        self.ema = {k: p.detach().clone() for k, p in self.params.items()}
        self.optimizers = build_optimizers(self.params, config)
        self.step = 0
        self._load()

    def run(self, loss_fn: LossFn) -> float:
        """Train to ``config.steps`` (or ``options.stop_at``); returns the mean loss of the last log interval."""
        end = min(self.config.steps, self.options.stop_at or self.config.steps)
        total, count, started = 0.0, 0, time.time()
        mean = float("nan")
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
        return mean

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
        # a short memory at the start, so that the first average is not the initial weights
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

    @property
    def _state_path(self) -> Path:
        return self.options.out / f"{self.name}.state.safetensors"

    def save(self) -> None:
        """Write the whole state; the JSON with the step number stands in the file's metadata."""
        if processes.rank() > 0:
            return
        tensors = {f"model.{k}": p.detach() for k, p in self.params.items()}
        tensors |= {f"ema.{k}": p for k, p in self.ema.items()}
        for key, p in self.params.items():
            for optimizer in self.optimizers:
                tensors |= {f"opt.{part}.{key}": v for part, v in optimizer.state.get(p, {}).items()}
        self.options.out.mkdir(parents=True, exist_ok=True)
        temporary = self._state_path.with_suffix(".tmp")
        save_file(
            {k: v.contiguous().cpu() for k, v in tensors.items()},
            temporary,
            metadata={"state": json.dumps({"stage": self.name, "step": self.step})},
        )
        temporary.replace(self._state_path)

    def _load(self) -> None:
        if not self._state_path.exists():
            return
        from safetensors import safe_open

        with safe_open(self._state_path, "pt") as file:
            self.step = int(json.loads(file.metadata()["state"])["step"])
        tensors = load_file(self._state_path)
        with torch.no_grad():
            for key, p in self.params.items():
                p.copy_(tensors[f"model.{key}"])
                self.ema[key].copy_(tensors[f"ema.{key}"])
        for full, value in tensors.items():
            if full.startswith("opt."):
                _, part, key = full.split(".", 2)
                p = self.params[key]
                # laid out in memory like its parameter: products of matrices round by their layout
                same = value.shape == p.shape
                self._owner(p).state[p][part] = torch.empty_like(p).copy_(value) if same else value.to(p.device)

    def _owner(self, p: nn.Parameter) -> torch.optim.Optimizer:
        return next(o for o in self.optimizers for g in o.param_groups if any(q is p for q in g["params"]))
