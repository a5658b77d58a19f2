"""`python -m trainer.tryout FILE --prompt "…"` draws pictures with a finished LoRA, with and without it, without a run.

With `--task` it is the process that the app keeps for its tab.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from trainer import cores
from trainer.__main__ import BUG, DONE, USER_ERROR, Parser
from trainer.errors import UserError
from trainer.tryout import origin
from trainer.tryout.task import Draw, Settings, Task, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0 done, 1 a user's error, 2 a bug."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cores.choose_waiting(os.environ)
    try:
        options = _parser().parse_args(arguments)
        if options.task is not None:
            from trainer.tryout import work  # late, as below: torch takes seconds, and a faulty setting none

            gc.freeze()  # as the trainer does
            task = Task(options.task.resolve())
            work.serve(task, task.path.parent.parent)
        else:
            _draw_all(options)
        return DONE
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return DONE
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}. This is a fault of the program", file=sys.stderr)
        return BUG


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m trainer.tryout", description="Draw pictures with a finished LoRA.")
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="a LoRA as a .safetensors file")
    parser.add_argument("--task", type=Path, metavar="DIR", help="a folder with settings and requests, as the app does")
    parser.add_argument("--base", default="", metavar="BASE", help="the base model: a diffusers folder, a file or a "
                        "hub id (default: that of the run in whose folder FILE lies)")
    parser.add_argument("--strength", type=float, nargs="+", default=[1.0], metavar="S",
                        help="how strongly it counts; several give a picture each (default: 1)")
    parser.add_argument("--width", type=int, default=0, help="in pixels (default: what the file was trained at)")
    parser.add_argument("--height", type=int, default=0, help="in pixels (default: the same)")
    parser.add_argument("--without", action="store_true", help="draw the base model's own picture, too")
    parser.add_argument("--out", type=Path, default=Path("tryout"), metavar="DIR",
                        help="where the pictures go (default: tryout)")
    parser.add_argument("--workspace", type=Path, default=Path("workspace"), help="whose runs have the GPU's turn")
    for key, kind in (("prompt", str), ("negative", str), ("seed", int), ("steps", int), ("guidance", float)):
        field = Draw.model_fields[key]
        parser.add_argument(f"--{key}", type=kind, default=field.default, metavar=key.upper(), help=field.description)
    for key in ("device", "precision", "quantize"):
        field = Settings.model_fields[key]
        parser.add_argument(f"--{key}", default=None, metavar=key.upper(), help=field.description)
    return parser


def _draw_all(options: argparse.Namespace) -> None:
    if options.file is None:
        raise UserError("give a LoRA as a .safetensors file; `python -m trainer.tryout --help` explains all options")
    given = {key: value for key in ("device", "precision", "quantize") if (value := getattr(options, key)) is not None}
    settings = parse(Settings, {**origin.find(options.file, options.base), **given})
    keys = ("prompt", "negative", "seed", "steps", "guidance", "width", "height")
    asked = {key: getattr(options, key) for key in keys}
    draws = [parse(Draw, {**asked, "file": str(options.file), "strength": strength}) for strength in options.strength]
    from trainer import gpu
    from trainer.tryout.bench import Bench
    from trainer.tryout.work import save

    bench = Bench(settings, _tell)
    lora = bench.lora(options.file)
    options.out.mkdir(parents=True, exist_ok=True)
    with gpu.turn(options.workspace.resolve(), bench.device, lambda: _tell("a run is using the GPU: waiting", 0, 0)):
        for draw in draws:
            chosen = bench.sampling(draw, lora)
            picture = bench.picture(draw, lora, chosen, f"strength {draw.strength:g}", with_lora=True)
            path = options.out / f"{options.file.stem}-{draw.seed}-{draw.strength:g}.png"
            save(path, picture, draw, chosen, draw.strength)
            _say(path)
        if options.without:
            picture = bench.picture(draws[0], lora, chosen, "without it", with_lora=False)
            path = options.out / f"{options.file.stem}-{draws[0].seed}-base.png"
            save(path, picture, draws[0], chosen, 0.0)
            _say(path)
    for remark in bench.remarks(lora):
        print(f"note: {remark}", file=sys.stderr)


def _tell(name: str, done: int, of: int) -> None:
    """One line that changes for a person; nothing into a file."""
    if sys.stderr.isatty():
        count = f" {done} of {of}" if of else ""
        print(f"\r\033[K{name}{count}", end="", file=sys.stderr, flush=True)


def _say(path: Path) -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
