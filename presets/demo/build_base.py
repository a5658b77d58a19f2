"""Builds the demo's base model and picture sets from emoji packages, in four stages on one GPU.

Run `render`, `vae`, `denoiser` and `export` in this order with the same `--work` folder. `vae` and `denoiser`
stop after `--minutes` and go on from their own saved state when they are called again. Settings stand at the top
of each stage's module in `recipe/`. Beyond the program's own packages, `render` needs `resvg_py`
0.5.0. The shipped base took sixteen minutes of one H200:

  build_base.py render --work W --packages P
  build_base.py vae --work W --minutes 6.7
  build_base.py denoiser --work W --minutes 8.6 --total-minutes 16.4
  build_base.py export --work W

It stops half-way down the cosine: with the other half, pictures get hardly sharper but are learned by heart
(the held-out loss goes from 0.34 to 0.41), and a LoRA's start suffers.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")

    render = stages.add_parser("render", help="draw the emoji of all packages at 128 px")
    render.add_argument("--packages", type=Path, required=True, metavar="DIR", help="folder of the `npm pack` archives")
    render.add_argument("--limit", type=int, metavar="N", help="only the first N of every style, for a trial run")

    for name, batch, help_text in (("vae", 64, "train the autoencoder"),
                                   ("denoiser", 512, "train text encoder and UNet together")):  # fmt: skip
        stage = stages.add_parser(name, help=help_text)
        stage.add_argument("--minutes", type=float, required=True, help="wall-clock time of this call")
        stage.add_argument("--total-minutes", type=float, metavar="MINUTES",
                           help="time of all calls of this stage, over which the learning rate falls "
                                "(default: --minutes)")  # fmt: skip
        stage.add_argument("--batch-size", type=int, default=batch, metavar="N", help="default: %(default)s")

    export = stages.add_parser("export", help="write base/, concept/ and heldout/")
    export.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR", help="default: %(default)s")
    for stage in stages.choices.values():
        stage.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the stages keep their state")
    return parser


def _render(args: argparse.Namespace) -> None:
    from recipe import render, sources

    if missing := sources.missing_archives(args.packages):
        raise SystemExit(f"{args.packages} lacks some packages. In that folder, run:\n  " + "\n  ".join(missing))
    render.run(args.packages, args.work, args.limit)


def _train(args: argparse.Namespace) -> None:
    from recipe import denoiser, training, vae

    training.prepare_device()
    stage = vae if args.stage == "vae" else denoiser
    stage.run(args.work, args.minutes, args.total_minutes or args.minutes, args.batch_size)


def _export(args: argparse.Namespace) -> None:
    from recipe import export

    export.run(args.work, args.out)


def main() -> None:
    args = _parser().parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    {"render": _render, "vae": _train, "denoiser": _train, "export": _export}[args.stage](args)


if __name__ == "__main__":
    main()
