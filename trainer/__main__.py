"""The command line: `python -m trainer --preset FILE` trains, `--resume RUN` goes on, `--branch RUN` begins another run
at its checkpoint, `--check` only looks, and verbs such as `list` and `show RUN` are about runs that are there."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from trainer import branch, cores, facts, several, shelf, shell, shell_bases, shell_queue, shell_shelf, shell_sweep
from trainer import preset as presets
from trainer import run as runs
from trainer.errors import NO_ROOM, UserError
from trainer.quantize import quiet_bitsandbytes
from trainer.queue import Queue
from trainer.run import Run
from trainer.runner import chosen_gpus
from trainer.schema import Preset

if TYPE_CHECKING:
    from trainer.distributed import World

DONE, USER_ERROR, BUG = 0, 1, 2
LOOKS = ("list", "show", "compare")  # verbs that write nothing but what they are told to
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun and accelerate say
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0 done or stopped, 1 a user's error, 2 a bug."""
    quiet_bitsandbytes()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] and words[0] in shell.VERBS:
            return _look(words)
        options = _parser().parse_args(words)
        cores.choose_waiting(os.environ)
        processes = _processes()
        if (options.check or processes > 1) and options.gpus:
            raise UserError("--gpus starts the processes of a run: it does not go with --check, accelerate or torchrun")
        if options.gpus:
            return several.launch(several.without_choice(words), several.choose(options.gpus, os.environ), os.environ)
        if options.check:
            return _check(options)
        if options.json:
            raise UserError("--json goes with --check")
        if "RANK" not in os.environ and len(named := chosen_gpus(_preset_of(options).memory.device)) > 1:
            chosen = several.choose(",".join(map(str, named)), os.environ, "memory.device = 'cuda:{}'")
            return several.launch(words, chosen, os.environ)
        return _train(*_chosen(options)) if processes == 1 else _train_together(options)
    except UserError as error:
        print(error, file=sys.stderr)
    except OSError as error:  # of the run's folder or its log: all else has its own message
        print(_about(error, is_look=bool(words) and words[0] in LOOKS), file=sys.stderr)
    return USER_ERROR


def _about(error: OSError, is_look: bool) -> str:
    """What to do about a file that the system refuses; a verb that only looks was reading it."""
    what = f"{error.filename or 'the run'} cannot be {'read' if is_look else 'written'}: {error.strerror}"
    if error.errno in NO_ROOM:
        return f"{what}; make room, or choose another --workspace"
    return f"{what}; see that it is there and that this user may use it, or choose another --workspace"


class Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **settings: Any) -> None:
        """Words are taken as they are: `--gpu 0` for --gpus would be passed on to the processes that --gpus starts."""
        super().__init__(*args, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """A user's error like any other; argparse itself would exit with the code of a bug."""
        raise UserError(f"{message}; `{self.prog} --help` explains all options")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m trainer", description="Train a LoRA without the app.",
                    epilog=f"About runs that are there: python -m trainer {'|'.join(shell.VERBS)}; each has a --help.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", metavar="FILE", help="a preset: a file, or the name of one in presets/")
    what.add_argument("--resume", metavar="RUN", type=Path, help="a run's folder: go on where it is")
    what.add_argument("--branch", metavar="RUN[@STEP]",
                      help="a new run that starts from a checkpoint of that one (the last, or that of STEP), with its "
                           "preset and the changes given by --set. It goes on counting at STEP, so that curves can be "
                           "laid over each other, and train.steps counts from the first run's beginning. Rank, method "
                           "and trained layers stay as they are")
    parser.add_argument("--set", dest="overrides", metavar="SECTION.KEY=VALUE", action="append", default=[],
                        help="change a setting; may be given several times")
    parser.add_argument("--name", help="the run's name (default: the preset's, with the first free number)")
    parser.add_argument("--workspace", type=Path, default=Path("workspace"), help="where runs/ and caches are kept")
    parser.add_argument("--gpus", metavar="N,N", help="the GPUs to train on together, such as 0,1 (or name them in the "
                        "preset: memory.device = 'cuda:0,1'): each takes train.batch_size images at a time, so that a "
                        "step has as many times more. (For several machines: torchrun or accelerate launch, with a "
                        "workspace that all of them see.)")
    parser.add_argument("--check", action="store_true", help="check everything that can be checked without training")
    parser.add_argument("--json", action="store_true", help="with --check: the report as JSON")
    return parser


def _look(words: Sequence[str]) -> int:
    """One of the verbs; torch is never loaded."""
    parser = Parser(prog="python -m trainer")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    shell.add_verbs(verbs)
    shell_shelf.add_verbs(verbs)
    shell_queue.add_verb(verbs)
    shell_sweep.add_verb(verbs)
    shell_bases.add_verb(verbs)
    options = parser.parse_args(words, argparse.Namespace(environment=dict(os.environ)))
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr] - a pipe may not know all letters
    print(options.work(options))
    return DONE


def _processes() -> int:
    """How many processes were started to train this run; refuses those that do not know of one another, since each
    would begin a run of its own."""
    sizes = {name: int(os.environ[name]) for name in ("WORLD_SIZE", *MPI) if os.environ.get(name, "").isdecimal()}
    missing = [name for name in LAUNCHED if name not in os.environ]
    if sizes.get("WORLD_SIZE", 1) > 1 and not missing:
        return sizes["WORLD_SIZE"]
    if any(size > 1 for size in sizes.values()):
        raise UserError(f"several processes were started ({', '.join(f'{k}={v}' for k, v in sizes.items())}) that "
                        f"cannot find one another ({', '.join(missing)} not set): start them by --gpus, accelerate "
                        "launch or torchrun")
    return 1


def _chosen(options: argparse.Namespace) -> tuple[Run, Preset, Path]:
    return _resume(options) if options.resume else _branch(options) if options.branch else _begin(options)


def _train_together(options: argparse.Namespace) -> int:
    """Be one of several processes; the first one alone begins the run, and speaks."""
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # who is lost is noticed elsewhere, and there is work to save
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # GPUs read from one another, and never write to all at once
    from trainer import distributed  # late: it loads torch

    world = distributed.join(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
                             int(os.environ.get("LOCAL_WORLD_SIZE") or 0))
    try:
        run, preset, workspace = world.from_first(lambda: _chosen(options))
    except UserError:
        if world.first:
            raise
        return USER_ERROR
    code = _train(run, preset, workspace, world)
    if code == DONE:
        world.close()
    return code


def _begin(options: argparse.Namespace) -> tuple[Run, Preset, Path]:
    """A new run, from a preset, and its workspace."""
    workspace = options.workspace.resolve()
    path = presets.find(options.preset, workspace)
    preset = presets.load(path, options.overrides)
    name = runs.free_name(workspace, path.stem, Queue(workspace).names()) if options.name is None else options.name
    return runs.create(workspace, name, presets.dumps(preset)), preset, workspace


def _resume(options: argparse.Namespace) -> tuple[Run, Preset, Path]:
    """An old run; its own preset counts, but for what a resume may change."""
    if options.name is not None:
        raise UserError("--name goes with --preset and --branch; a resumed run keeps its name")
    run = runs.open_run(options.resume)
    if run.is_held():  # its preset is not ours to change
        raise run.busy()
    shelf.settle(run)  # a kill may have come between the renaming of the folder and that of its files
    before = presets.load(run.preset)
    after = presets.load(run.preset, options.overrides)
    presets.check_resume(before, after)
    if after.train.steps is not None and after.train.steps < run.last_step():
        raise UserError(f"--set train.steps={after.train.steps}: this run is already at step {run.last_step()}; "
                        "give as many steps or more")
    if after != before:
        presets.save(run.preset, presets.dumps(after))
    return run, after, run.path.parent.parent


def _branch(options: argparse.Namespace) -> tuple[Run, Preset, Path]:
    """A new run from a checkpoint of another one."""
    workspace = options.workspace.resolve()
    origin, step = _checkpoint(workspace, options.branch)
    preset = branch.preset_of(origin, options.overrides)
    return branch.begin(workspace, origin, step, preset, options.name), preset, workspace


def _checkpoint(workspace: Path, text: str) -> tuple[Run, int | None]:
    """The run and step meant by RUN[@STEP]."""
    name, at, step = text.rpartition("@")
    if not at:
        return facts.find_run(workspace, text), None
    if not step.isdecimal():
        raise UserError(f"--branch {text}: write it as RUN@STEP, with the number of a step that has a checkpoint")
    return facts.find_run(workspace, name), int(step)


def _preset_of(options: argparse.Namespace) -> Preset:
    """The preset that a command line means."""
    workspace = options.workspace.resolve()
    if options.branch:
        return branch.preset_of(_checkpoint(workspace, options.branch)[0], options.overrides)
    path = runs.open_run(options.resume).preset if options.resume else presets.find(options.preset, workspace)
    return presets.load(path, options.overrides)


def _check(options: argparse.Namespace) -> int:
    workspace = runs.open_run(options.resume).path.parent.parent if options.resume else options.workspace.resolve()
    try:
        preset = _preset_of(options)
    except UserError as error:
        if not options.json:
            raise
        print(json.dumps({"errors": str(error).splitlines(), "warnings": [], "facts": {}}, ensure_ascii=False))
        return USER_ERROR
    _begin_leanly()
    from trainer import check  # late: it loads torch, and a faulty preset needs none

    report = check.inspect(preset, workspace)
    print(report.as_json() if options.json else report.as_text())
    return USER_ERROR if report.errors else DONE


def _train(run: Run, preset: Preset, workspace: Path, world: World | None = None) -> int:
    with _logged(run) as stderr:
        speaks = world is None or world.first
        try:
            if preset.train.deterministic:
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(workspace / "cache" / "compiled"))  # for later runs
            _begin_leanly()
            from trainer.distributed import ALONE  # late: torch takes seconds, and a faulty preset none
            from trainer.loop import run_training

            gc.freeze()  # what was imported stays: a look through it for what can go takes 0.4 s, many times in a run
            run_training(run, preset, workspace, stderr if stderr.isatty() else None, world=world or ALONE)
            if speaks and not stderr.isatty():  # the progress went to the log
                print(f"{run.state().text}: {run.path}", file=stderr, flush=True)
        except UserError as error:
            for stream in (stderr, sys.stderr) if speaks else ():  # the terminal, and the log
                with suppress(OSError):  # the disk may be full
                    print(error, file=stream, flush=True)
            return USER_ERROR
        except KeyboardInterrupt:
            return DONE
        except Exception as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {error}. This is a fault of the program; the whole story is in {run.log}",
                  file=stderr, flush=True)
            return BUG
    return DONE


def _begin_leanly() -> None:
    """Where this process is ours alone: a test that calls `main` needs all of diffusers after it."""
    if __name__ == "__main__":
        from trainer import lean  # late, as is all that loads torch

        lean.begin()


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


def _leave(code: int) -> NoReturn:
    """End; at once where a GPU may wait for a process that is lost, and would keep this one from ending."""
    if code != DONE and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
