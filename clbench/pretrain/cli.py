"""The command `clbench pretrain clip-small`. Parse, call, print."""

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["pretrain_app"]

pretrain_app = typer.Typer(help="Train the small CLIP that clbench ships.", no_args_is_help=True)


@pretrain_app.callback()
def root() -> None:
    """Models that clbench trains itself."""


@pretrain_app.command("clip-small")
def clip_small(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for checkpoints, log and the weights.")] = Path(
        "results/clip-small"
    ),
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Optimiser steps.")] = 2600,
    batch: Annotated[int, typer.Option(metavar="N", min=16, help="Images per step.")] = 192,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1.5e-3,
    seed: Annotated[int, typer.Option(help="Initial weights and all draws.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "bf16",
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="CPU threads; results can depend on it.")] = 1,
    checkpoint_every: Annotated[int, typer.Option(metavar="N", min=1, help="Steps between checkpoints.")] = 100,
    data: Annotated[
        list[Path] | None, typer.Option("--data", metavar="DIR", help="Folder searched for data (repeatable).")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Zero-shot accuracy on the held-out domains at the end.")
    ] = True,
) -> None:
    """Train clip-small on images of real data sets and captions made from their class names; goes on where it was
    interrupted. The domains of mtil-small are held out."""
    from dataclasses import asdict

    import torch

    from clbench.backbones.clip_model import as_clip
    from clbench.backbones.factory import build
    from clbench.errors import unknown_name
    from clbench.learner.resolve import find_device
    from clbench.pretrain.evaluate import zero_shot
    from clbench.pretrain.export import export
    from clbench.pretrain.train import Recipe, open_sources, train

    if precision not in ("fp32", "bf16"):
        raise unknown_name("precision", precision, ["fp32", "bf16"])
    torch.set_num_threads(threads)
    where = find_device(device)
    roots = data or []
    recipe = Recipe(steps=steps, batch=batch, lr=lr, seed=seed, precision=precision)
    model = as_clip(build("clip-small", in_shape=(3, 64, 64), seed=seed, pretrained=False), "pretraining")
    sources = open_sources(roots)
    train(model, sources, recipe, out, device=where, checkpoint_every=checkpoint_every)
    collections = tuple(sorted({tag for source in sources for tag in source.own_images}))
    path = out / "clip-small.safetensors"
    size = export(model, collections, path)
    print(f"{path}: {size / 2**20:.1f} MiB, trained on {', '.join(collections)}")
    if evaluate:
        # as it ships: the rounded weights
        shipped = as_clip(build("clip-small", in_shape=(3, 64, 64), seed=0, weights=path).to(where), "evaluation")
        rows = zero_shot(shipped, roots=roots, device=where)
        (out / "zero-shot.json").write_text(
            json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8"
        )
        for row in rows:
            print(
                f"{row.dataset:14} {100 * row.accuracy:5.1f} % of {row.images} images, {row.classes} classes: "
                f"{row.accuracy / row.chance:.1f} x chance"
            )
