"""``python -m nora_diffusion.tiny_sd.train``: train the stages of the base, resume them, and export the weights."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from ..errors import UserError
from ..pipelines.base import EMBEDDED_WEIGHTS
from ..programs import program, run_program
from .recipe import processes
from .recipe.configs import SIZES, Size, Stage
from .recipe.loop import LoopOptions, state_path
from .recipe.ship import export_all, frozen_vae
from .recipe.stage_clip import train_judge
from .recipe.stage_diffusion import train_diffusion
from .recipe.stage_vae import train_vae
from .recipe.tokenizer import build_tokenizer

STAGES: tuple[Stage, ...] = ("vae", "diffusion", "judge")


def run_stage(
    stage: Stage,
    size: Size,
    options: LoopOptions,
    seed: int = 0,
    device: str | None = None,
    init: Path | None = None,
    compiled: bool = False,
) -> None:
    """Train one stage; resume from its state in ``options.out`` if there is one.

    VAE, UNet and text encoder start from the pipeline folder ``init`` if it is given; the decoder stage needs it. The
    diffusion stage needs a trained autoencoder: that of the run's VAE stage, or that of ``init``. Raises
    :class:`UserError` if something is missing or the processes cannot share the stage.
    """
    if stage != "diffusion" and processes.world_size() > 1:
        raise UserError(f"--stage {stage} runs in one process; only --stage diffusion supports several")
    batch = size.stages[stage].batch
    if batch % processes.world_size():
        raise UserError(f"{processes.world_size()} processes cannot share --batch {batch} evenly: choose a multiple")
    if stage == "decoder" and init is None:
        raise UserError("--stage decoder continues a trained autoencoder: give its pipeline by --init")
    torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if stage in ("vae", "decoder"):
        train_vae(size, options, seed, torch_device, init, decoder_only=stage == "decoder")
        return
    with processes.main_process_first():
        tokenizer = build_tokenizer(options.out / "tokenizer")
        vae = frozen_vae(size, options.out, seed, init) if stage == "diffusion" else None
    if vae is not None:
        train_diffusion(size, vae, tokenizer, options, seed, torch_device, init, compiled)
    else:
        train_judge(size, tokenizer, options, seed, torch_device)


def adjusted(size: Size, stage: Stage, **settings: Any) -> Size:
    """The size with other settings of a stage; None keeps a setting."""
    changes = {name: value for name, value in settings.items() if value is not None}
    return replace(size, stages={**size.stages, stage: replace(size.stages[stage], **changes)})


@program
def main() -> int:
    """Train the embedded base, stage by stage, and export its weights."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--stage", choices=[*get_args(Stage), "all"], default="all", help="default: %(default)s")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="folder for training states, log and weights")
    parser.add_argument("--steps", type=int, help="steps of the stage (default: from --size)")
    parser.add_argument("--batch", type=int, help="batch size over all processes (default: from --size)")
    parser.add_argument("--lr", type=float, help="learning rate of the stage (default: from --size)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--init", help="initial weights: 'shipped' or a pipeline folder (default: random)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: slow to start, then faster")
    parser.add_argument(
        "--save-every", type=int, default=LoopOptions.save_every, help="steps between two saves (default: %(default)s)"
    )
    args = parser.parse_args()
    processes.init()
    init = None if args.init is None else EMBEDDED_WEIGHTS / "pipeline" if args.init == "shipped" else Path(args.init)
    stages: tuple[Stage, ...] = STAGES if args.stage == "all" else (args.stage,)
    for stage in stages:
        size = adjusted(SIZES[args.size], stage, steps=args.steps, batch=args.batch, lr=args.lr)
        options = LoopOptions(args.out, save_every=args.save_every)
        run_stage(stage, size, options, args.seed, args.device, init, args.compile)
    if processes.rank() == 0 and state_path(args.out, "diffusion").exists():
        export_all(SIZES[args.size], args.out, args.out / "weights", args.seed)
    return 0


if __name__ == "__main__":
    run_program(main)
