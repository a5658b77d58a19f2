"""The verb `queue`: let runs wait for a GPU, see what waits, change its order, and train it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trainer import preset as presets
from trainer import runner
from trainer.detached import TRAINER
from trainer.queue import Queue
from trainer.shell import Verbs, as_json, table


def add_verb(verbs: Verbs) -> None:
    """Its actions; without one it starts to train what waits."""
    help = "runs that wait for a GPU; without an ACTION: train them, in processes of their own, and return"
    queue = verbs.add_parser("queue", help=help, description=help)
    queue.add_argument("--workspace", type=Path, default=Path("workspace"), help="where runs/ and queue/ are kept")
    queue.add_argument("--json", action="store_true", help="what waits, as JSON")
    queue.set_defaults(work=start)
    actions = queue.add_subparsers(metavar="ACTION")
    for name, work, help in (("list", listing, "what is being trained, what waits, what failed"),
                             ("add", add, "put a run at the end, and train it when its turn comes"),
                             ("move", move, "make a waiting run the PLACEth to begin"),
                             ("cancel", cancel, "take a waiting run out"),
                             ("dismiss", dismiss, "forget a failure"),
                             ("run", run, "train what waits, here, on one GPU, until nothing is left")):
        action = actions.add_parser(name, help=help, description=help)
        action.set_defaults(work=work)
        # Not to undo what stands before the action
        action.add_argument("--workspace", type=Path, default=argparse.SUPPRESS, help="where runs/ and queue/ are kept")
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="what waits, as JSON")
        if name in ("move", "cancel", "dismiss"):
            action.add_argument("name", metavar="RUN", help="the run's name")
        if name == "move":
            action.add_argument("place", metavar="PLACE", type=int, help="1 is the next")
        if name == "add":
            action.add_argument("preset", metavar="PRESET", help="a preset: a file, or the name of one in presets/")
            action.add_argument("--set", dest="overrides", metavar="SECTION.KEY=VALUE", action="append", default=[],
                                help="change a setting; may be given several times")
            action.add_argument("--name", help="the run's name (default: the preset's, with the first free number)")
        if name == "run":
            action.add_argument("--gpu", default="", help="as CUDA_VISIBLE_DEVICES takes it; default: none is chosen")


def start(options: argparse.Namespace) -> str:
    """Detached runners, one a GPU; those that are there already go on."""
    runner.start_runners(options.workspace.resolve(), TRAINER, options.environment)
    return listing(options)


def listing(options: argparse.Namespace) -> str:
    queue = Queue(options.workspace.resolve())
    if options.json:
        return as_json(facts(queue))
    rows = [["begun", "", entry.name, ""] for entry in queue.begun()]
    rows += [["waits", str(place), entry.name, ""] for place, entry in enumerate(queue.waiting(), 1)]
    rows += [["failed", "", failure.name, failure.reason.splitlines()[0] if failure.reason else ""]
             for failure in queue.failures()]
    return table(rows) if rows else "nothing waits"


def facts(queue: Queue) -> dict[str, Any]:
    """The queue as plain values."""
    return {"begun": [entry.name for entry in queue.begun()], "waiting": [entry.name for entry in queue.waiting()],
            "failed": {failure.name: failure.reason for failure in queue.failures()}}


def add(options: argparse.Namespace) -> str:
    workspace = options.workspace.resolve()
    path = presets.find(options.preset, workspace)
    Queue(workspace).add(presets.load(path, options.overrides), options.name, path.stem)
    return start(options)


def move(options: argparse.Namespace) -> str:
    Queue(options.workspace.resolve()).move(options.name, options.place)
    return listing(options)


def cancel(options: argparse.Namespace) -> str:
    Queue(options.workspace.resolve()).cancel(options.name)
    return listing(options)


def dismiss(options: argparse.Namespace) -> str:
    Queue(options.workspace.resolve()).dismiss(options.name)
    return listing(options)


def run(options: argparse.Namespace) -> str:
    runner.serve(options.workspace.resolve(), options.gpu, TRAINER, options.environment,
                 lambda text: print(text, flush=True))
    return listing(options)
