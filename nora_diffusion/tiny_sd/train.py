"""``python -m nora_diffusion.tiny_sd.train``: train the base's stages, resume them, and write the weights."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from ..pipelines.base import EMBEDDED_WEIGHTS
from .recipe import processes
from .recipe.configs import SIZES, Size, Stage
from .recipe.loop import LoopOptions
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
    """Train one stage, from its state in ``options.out`` if there is one.

    Autoencoder, UNet and text encoder start from those of the pipeline folder ``init``, which the decoder alone must.
    Diffusion needs a trained autoencoder: the VAE stage's state, or that of ``init``.
    """
    if stage != "diffusion" and processes.count() > 1:
        raise SystemExit(f"error: --stage {stage} runs in one process; only --stage diffusion is shared by several")
    batch = size.stages[stage].batch
    if batch % processes.count():
        raise SystemExit(f"error: {processes.count()} processes cannot share --batch {batch} evenly: choose a multiple")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if stage in ("vae", "decoder"):
        if stage == "decoder" and init is None:
            raise SystemExit("error: --stage decoder goes on from trained latents: name them by --init")
        train_vae(size, options, seed, where, init, decoder_only=stage == "decoder")
        return
    with processes.first_alone():
        tokenizer = build_tokenizer(options.out / "tokenizer")
        vae = frozen_vae(size, options.out, seed, init) if stage == "diffusion" else None
    if vae is not None:
        train_diffusion(size, vae, tokenizer, options, seed, where, init, compiled)
    else:
        train_judge(size, tokenizer, options, seed, where)


def adjusted(size: Size, stage: Stage, **settings: Any) -> Size:
    """The size with other settings of a stage, those that are not None (the rate's decay moves with the steps)."""
    changes = {name: value for name, value in settings.items() if value is not None}
    return replace(size, stages={**size.stages, stage: replace(size.stages[stage], **changes)})


def main() -> None:
    """Command line of the recipe."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--stage", choices=[*get_args(Stage), "all"], default="all")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--out", type=Path, required=True, help="folder of the states, the log and the weights")
    parser.add_argument("--steps", type=int, help="steps of the stage (default: the size's own)")
    parser.add_argument("--batch", type=int, help="pictures of a step, over all processes (default: the size's own)")
    parser.add_argument("--lr", type=float, help="learning rate of the stage (default: the size's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu or cuda (default: what is there)")
    parser.add_argument("--init", help="'shipped' or a pipeline folder: where the stage starts")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: minutes once, then faster")
    parser.add_argument("--save-every", type=int, default=200)
    args = parser.parse_args()
    processes.join()
    init = None if args.init is None else EMBEDDED_WEIGHTS / "pipeline" if args.init == "shipped" else Path(args.init)
    chosen: tuple[Stage, ...] = STAGES if args.stage == "all" else (args.stage,)
    for stage in chosen:
        size = adjusted(SIZES[args.size], stage, steps=args.steps, batch=args.batch, lr=args.lr)
        options = LoopOptions(args.out, save_every=args.save_every)
        run_stage(stage, size, options, args.seed, args.device, init, args.compile)
    if processes.rank() == 0 and (args.out / "diffusion.state.safetensors").exists():
        export_all(args.out, args.out / "weights", args.size, args.seed)


if __name__ == "__main__":
    main()
