"""The command line: `python -m trainer --preset FILE` trains, `--resume RUN` goes on, `--check` only looks."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from trainer import preset as presets
from trainer import run as runs
from trainer.errors import UserError
from trainer.run import Run
from trainer.schema import Preset

DONE, USER_ERROR, BUG = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0 done or stopped, 1 a user's error, 2 a bug."""
    options = _parser().parse_args(arguments)
    workspace = options.workspace.resolve()
    try:
        if options.check:
            return _check(options, workspace)
        run, preset = _resume(options) if options.resume else _begin(options, workspace)
        workspace = run.path.parent.parent if options.resume else workspace
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    return _train(run, preset, workspace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Train a LoRA without the app.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", metavar="FILE", help="a preset: a file, or the name of one in presets/")
    what.add_argument("--resume", metavar="RUN", type=Path, help="a run's folder: go on where it is")
    parser.add_argument("--set", dest="overrides", metavar="SECTION.KEY=VALUE", action="append", default=[],
                        help="change a setting; may be given several times")
    parser.add_argument("--name", help="the run's name (default: the preset's, with the first free number)")
    parser.add_argument("--workspace", type=Path, default=Path("workspace"), help="where runs/ and caches are kept")
    parser.add_argument("--check", action="store_true", help="check everything that can be checked without training")
    parser.add_argument("--json", action="store_true", help="with --check: the report as JSON")
    return parser


def _begin(options: argparse.Namespace, workspace: Path) -> tuple[Run, Preset]:
    """A new run, from a preset."""
    path = presets.find(options.preset, workspace)
    preset = presets.load(path, options.overrides)
    name = options.name or runs.free_name(workspace, path.stem)
    return runs.create(workspace, name, presets.dumps(preset)), preset


def _resume(options: argparse.Namespace) -> tuple[Run, Preset]:
    """An old run; its own preset counts, but for what a resume may change."""
    if options.name:
        raise UserError("--name goes with --preset; a resumed run keeps its name")
    run = runs.open_run(options.resume)
    before = presets.load(run.preset)
    after = presets.load(run.preset, options.overrides)
    presets.check_resume(before, after)
    if after.train.steps is not None and after.train.steps < run.last_step():
        raise UserError(f"--set train.steps={after.train.steps}: this run is already at step {run.last_step()}")
    if after != before:
        presets.save(run.preset, presets.dumps(after))
    return run, after


def _check(options: argparse.Namespace, workspace: Path) -> int:
    from trainer import check  # late: it loads torch

    run_preset = runs.open_run(options.resume).preset if options.resume else presets.find(options.preset, workspace)
    report = check.inspect(presets.load(run_preset, options.overrides), workspace)
    print(report.as_json() if options.json else report.as_text())
    return USER_ERROR if report.errors else DONE


def _train(run: Run, preset: Preset, workspace: Path) -> int:
    with _logged(run) as stderr:
        try:
            if preset.train.deterministic:
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
            from trainer.loop import run_training  # late: torch takes seconds, and a faulty preset none

            run_training(run, preset, workspace, stderr if stderr.isatty() else None)
        except UserError as error:
            traceback.print_exc()
            print(error, file=stderr, flush=True)
            return USER_ERROR
        except KeyboardInterrupt:
            return DONE
        except Exception as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {error}. This is a fault of the program; the whole story is in {run.log}",
                  file=stderr, flush=True)
            return BUG
    return DONE


@contextmanager
def _logged(run: Run) -> Iterator[TextIO]:
    """Send all that is printed, by libraries too, to `trainer.log`; yields the terminal's stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    terminal = open(kept[1], "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - closed below
    with open(run.log, "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        terminal.flush()
        for number, copy in zip((1, 2), kept):
            os.dup2(copy, number)
            os.close(copy)


if __name__ == "__main__":
    sys.exit(main())
