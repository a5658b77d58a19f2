"""The verbs that put runs in order: `rename`, `delete` (to the trash), `restore`."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer import facts, shelf
from trainer.errors import UserError
from trainer.run import Run
from trainer.shell import Verbs, add_common, as_json
from trainer.wording import size


def add_verbs(verbs: Verbs) -> None:
    """Their options."""
    rename_verb = _add(verbs, "rename", rename, "give a run another name; its LoRA files get it too")
    rename_verb.add_argument("run", metavar="RUN", help="a run's name, or its folder")
    rename_verb.add_argument("new", metavar="NEW", help="its new name")
    delete_verb = _add(verbs, "delete", delete, "move a run to the trash, workspace/trash/runs; nothing is erased "
                                                "without --forever")
    delete_verb.add_argument("run", metavar="RUN", nargs="?", help="a run's name, or its folder")
    delete_verb.add_argument("--forever", action="store_true",
                             help="erase for good: the run, or without RUN all runs in the trash")
    restore_verb = _add(verbs, "restore", restore, "bring a run back from the trash; without RUN: what is there")
    restore_verb.add_argument("run", metavar="RUN", nargs="?", help="its name (the newest of that name), or its name "
                                                                    "in the trash")


def _add(verbs: Verbs, name: str, work: object, help: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=help, description=help)
    verb.set_defaults(work=work)
    add_common(verb)
    return verb


def rename(options: argparse.Namespace) -> str:
    run, workspace = _run(options)
    named = shelf.rename(workspace, run, options.new)
    return as_json({"run": named.name, "path": str(named.path)}) if options.json else (
        f"{run.name} is called {named.name} now: {named.path}")


def delete(options: argparse.Namespace) -> str:
    if options.run is None:
        return _empty(options.workspace.resolve(), options)
    run, workspace = _run(options)
    entry = shelf.delete(workspace, run)
    if options.forever:
        freed = shelf.erase(workspace, [entry])
        return as_json({"erased": [run.name], "bytes": freed}) if options.json else (
            f"{run.name} is erased; {size(freed)} came free")
    return as_json({"trashed": run.name, "entry": entry}) if options.json else (
        f"{run.name} is in the trash now: {workspace / 'trash' / 'runs' / entry}. To have it back: "
        f"python -m trainer restore {entry}. To erase all that is in the trash: python -m trainer delete --forever")


def _run(options: argparse.Namespace) -> tuple[Run, Path]:
    """The run, and its own workspace, which a folder's path may name better than --workspace."""
    run = facts.find_run(options.workspace.resolve(), options.run)
    if run.path.parent.name != "runs":
        raise UserError(f"{run.path} is not in the runs/ of a workspace; rename or move that folder yourself")
    return run, run.path.parent.parent


def _empty(workspace: Path, options: argparse.Namespace) -> str:
    if not options.forever:
        raise UserError("say which run: python -m trainer delete RUN; with --forever and no RUN all runs in the trash "
                        "are erased")
    gone = shelf.trash(workspace)
    freed = shelf.erase(workspace, [one.entry for one in gone])
    if options.json:
        return as_json({"erased": [one.name for one in gone], "bytes": freed})
    return f"{len(gone)} runs in the trash are erased; {size(freed)} came free" if gone else "the trash has no runs"


def restore(options: argparse.Namespace) -> str:
    workspace = options.workspace.resolve()
    there = shelf.trash(workspace)
    if options.run is None:
        if options.json:
            return as_json([one._asdict() for one in there])
        return "\n".join(f"{one.entry}  {size(one.bytes)}" for one in there) or "the trash has no runs"
    entry = next((one.entry for one in there if options.run in (one.entry, one.name)), None)
    if entry is None:
        raise UserError(f"no run called {options.run[:200]!r} is in the trash; `python -m trainer restore` lists what "
                        "is there")
    run = shelf.restore(workspace, entry)
    return as_json({"run": run.name, "path": str(run.path)}) if options.json else f"{run.name} is back: {run.path}"
