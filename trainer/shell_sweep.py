"""The verb `sweep`: a comparison from one preset, put into the queue."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trainer import preset as presets
from trainer import runner, sweep
from trainer.detached import TRAINER
from trainer.shell import Verbs, add_common, as_json, table
from trainer.sweep import Sweep

HELP = "compare methods, ranks, learning rates and seeds: a run of each, made from one preset and put into the queue"
LISTS = (("--methods", "LIST", "such as lora,stiefel,stella (default: the preset's)"),
         ("--ranks", "LIST", "such as 8,16 (default: the preset's)"),
         ("--lrs", "LIST", "learning rates: 1e-4,3e-4 for all, or x0.5,x1,x2 times each method's own "
                           "(default: the method's own)"),
         ("--seeds", "LIST", "such as 0,1,2; all settings get the same data order and noise by each seed "
                             "(default: the preset's)"))


def add_verb(verbs: Verbs) -> None:
    verb = verbs.add_parser("sweep", help=HELP, description=HELP)
    verb.add_argument("--preset", metavar="FILE", required=True,
                      help="a preset: a file, or the name of one in presets/")
    for option, metavar, help in LISTS:
        verb.add_argument(option, metavar=metavar, default="", help=help)
    verb.add_argument("--set", dest="overrides", metavar="SECTION.KEY=VALUE", action="append", default=[],
                      help="change a setting of all runs; may be given several times")
    verb.add_argument("--name", help="the comparison's name, with which its runs' names begin (default: the preset's)")
    verb.add_argument("--dry-run", action="store_true", help="only say what would be queued")
    add_common(verb)
    verb.set_defaults(work=work)


def work(options: argparse.Namespace) -> str:
    """Plan it, say what it is, and unless it is a dry run let the queue train it."""
    workspace: Path = options.workspace.resolve()
    choice = sweep.parse(options.methods, options.ranks, options.lrs, options.seeds)
    planned = sweep.plan(workspace, presets.find(options.preset, workspace), choice, options.overrides, options.name)
    if not options.dry_run:
        sweep.start(workspace, planned)
        runner.start_runners(workspace, TRAINER, options.environment)
    return as_json(facts(planned)) if options.json else _said(planned, options.dry_run)


def facts(planned: Sweep) -> dict[str, Any]:
    """What was planned, as plain values."""
    return {"name": planned.name, "preset": planned.preset, "shape": sweep.shape(planned),
            "runs": [[one.name, *sweep.row(one.preset)] for one in planned.runs], "seconds": planned.seconds,
            "known": planned.known, "remarks": planned.remarks}


def _said(planned: Sweep, is_dry: bool) -> str:
    head = ["run", "method", "rank", "learning rate", "seed"]
    rows = [[one.name, *map(_cell, sweep.row(one.preset))] for one in planned.runs]
    done = "would be queued" if is_dry else "put into the queue"
    after = (f"{planned.name}: {sweep.shape(planned)}, {done}. {_time(planned)}",
             *(f"note: {remark}" for remark in planned.remarks),
             "" if is_dry else f"when they have trained: python -m trainer compare {planned.name}")
    return "\n\n".join([table([head, *rows]), "\n".join(filter(None, after))])


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _time(planned: Sweep) -> str:
    if planned.seconds is None:
        return "How long they take is not known: nothing like them has trained here before."
    minutes = planned.seconds / 60
    said = f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
    return f"They train for about {said} one after the other, with pictures and measurements on top."
