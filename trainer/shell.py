"""The verbs of the command line that look at runs or stop one: `list`, `show`, `compare`, `stop`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from trainer import comparison, facts, notes, sweep
from trainer.errors import UserError
from trainer.events import Event
from trainer.facts import Export, Facts, Overview
from trainer.files import write_atomic
from trainer.queue import Queue
from trainer.report import card
from trainer.report import comparison as report
from trainer.run import Run, list_runs
from trainer.wording import number, sentence, size

POLL = 0.2  # seconds between two looks whether a run has ended
MOST_COMPARED = 50
VERBS = ("list", "show", "compare", "stop", "rename", "delete", "restore", "sweep", "queue", "bases")
Table = list[list[str]]
Verbs = argparse._SubParsersAction  # type: ignore[type-arg] - what add_subparsers gives has no public name


def add_verbs(verbs: Verbs) -> None:
    """Their options; each parser's `work` takes the options and returns what to print."""
    for name, work, help in (("list", list_all, "all runs, the newest first"),
                             ("show", show, "all that is known of one run"),
                             ("compare", compare, "several runs side by side, and which differences count"),
                             ("stop", stop, "ask a run to save and end")):
        verb = verbs.add_parser(name, help=help, description=help)
        verb.set_defaults(work=work)
        if name in ("show", "stop"):
            verb.add_argument("run", metavar="RUN", help="a run's name, or its folder")
        if name in ("show", "compare"):
            verb.add_argument("--html", metavar="FILE", type=Path,
                              help="write it as one HTML file to share, with curves and pictures")
        if name == "compare":
            verb.add_argument("runs", metavar="RUN", nargs="+",
                              help="names of runs or of a comparison, or folders of runs")
        if name == "stop":
            verb.add_argument("--wait", action="store_true", help="return when the run has ended")
        add_common(verb)


def add_common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--workspace", type=Path, default=Path("workspace"), help="where runs/ is kept")
    verb.add_argument("--json", action="store_true", help="the same facts as JSON")


def list_all(options: argparse.Namespace) -> str:
    """One line a run."""
    listed = list_runs(options.workspace.resolve())
    rows, bests = [facts.overview(run) for run in listed], [facts.best_of(run) for run in listed]
    if options.json:
        return as_json([row.__dict__ | {"best": (best or {}).get("step")} for row, best in zip(rows, bests)])
    if not rows:
        return f"no runs in {options.workspace.resolve() / 'runs'}"
    head = ["name", "state", "step", "best", "loss", "s/it", "method", "started"]
    return table([head, *([row.name, row.text, _steps(row), str(best.get("step")) if best else "–", number(row.loss),
                           number(row.sec, 3), row.method, _date(row.started)] for row, best in zip(rows, bests))])


def show(options: argparse.Namespace) -> str:
    """All facts of one run."""
    run = facts.find_run(options.workspace.resolve(), options.run)
    if options.html:
        return _written(options.html, card.make(run))
    known = facts.collect(run)
    if options.json:
        return as_json(known.as_dict() | {"own_notes": notes.read(run)})
    return "\n\n".join(part for part in (table(_summary(known)), _measured(known), _changes(known), _files(known),
                                         _told(known), _own_notes(run)) if part)


def compare(options: argparse.Namespace) -> str:
    """The same facts of several runs as a table, then what is significant."""
    workspace = options.workspace.resolve()
    runs = [facts.find_run(workspace, name) for name in dict.fromkeys(_spelt_out(workspace, options.runs))]
    if not 2 <= len(runs) <= MOST_COMPARED:
        raise UserError(f"compare takes 2 to {MOST_COMPARED} different runs, not {len(runs)}; "
                        "`python -m trainer list` names them all")
    if options.html:
        return _written(options.html, report.make(runs, options.runs[0] if len(options.runs) == 1 else "Comparison"))
    known = [facts.collect(run) for run in runs]
    findings = comparison.compare(known)
    if options.json:
        return as_json({"runs": [one.as_dict() for one in known], "findings": [item.as_dict() for item in findings]})
    rows = [["", *(one.overview.name for one in known)],
            *([label, *map(of, known)] for label, of in COLUMNS), *_unlike(known)]
    said = [sentence(finding) for finding in findings]
    return "\n\n".join([table(rows), "\n".join(said or ["nothing was measured on held-out images, so that nothing can "
                                                         "be said of which is better: set evaluate.folder"])])


def _written(path: Path, html: str) -> str:
    """Put a report down.  `UserError` where it cannot be written."""
    try:
        write_atomic(path, html.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; choose another --html FILE") from None
    return f"{path}: {size(path.stat().st_size)}; open it in a browser"


def _spelt_out(workspace: Path, names: Sequence[str]) -> list[str]:
    """The runs that have begun, of a comparison that is named instead of them."""
    made = {one.name: [name for name in one.runs if (workspace / "runs" / name / "preset.toml").is_file()]
            for one in sweep.listing(workspace)}
    return [run for name in names for run in (made.get(name) or [name])]


def stop(options: argparse.Namespace) -> str:
    """Post the request that the app's button posts."""
    run = facts.find_run(options.workspace.resolve(), options.run)
    state = run.state()
    if not run.is_held():
        raise UserError(f"{run.name} is not being trained ({state.text}): there is nothing to stop")
    run.request("stop")
    Queue(options.workspace.resolve()).let_go(run.name)
    text = (f"{run.name} was asked to stop: it finishes its step, saves a checkpoint and its LoRA file, and ends. "
            f"To go on later: python -m trainer --resume {run.path}")
    if options.wait:
        while run.is_held():
            time.sleep(POLL)
        text = f"{run.name}: {run.state().text}. To go on: python -m trainer --resume {run.path}"
    return as_json({"run": run.name, "state": run.state().word}) if options.json else text


def table(rows: Table) -> str:
    """Columns, wide enough for what is in them."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1, default=str)


def _steps(row: Overview) -> str:
    return f"{row.step} of {row.steps}" if row.steps else "–"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _setting(section: str, key: str) -> Callable[[Facts], str]:
    return lambda known: _value(known.preset.get(section, {}).get(key))


def _value(value: Any) -> str:
    return "–" if value is None else str(value)


def _loss(event: Event | None) -> str:
    return f"{number(event['loss'])} at {event.get('step')}" if event else "–"


def _kid(known: Facts) -> str:
    event = known.distance or {}
    if not isinstance(event.get("kid"), (int, float)):
        return "–"
    low, high = event.get("kid_low"), event.get("kid_high")
    interval = f" ({number(low, 3)} to {number(high, 3)})" if low is not None and high is not None else ""
    return f"{number(event['kid'], 3)}{interval}"


def _fd(known: Facts) -> str:
    event = known.distance or {}
    return f"{number(event['fd'])} (floor {number(event.get('fd_floor'))})" if event.get("fd") is not None else "–"


def _file(export: Export | None) -> str:
    return size(export.bytes) if export else "–"


def _memory(known: Facts) -> str:
    return size(known.peak_vram) if known.peak_vram else f"{size(known.peak_ram)} RAM" if known.peak_ram else "–"


COLUMNS: tuple[tuple[str, Callable[[Facts], str]], ...] = (
    ("state", lambda known: known.overview.text), ("method", _setting("adapter", "method")),
    ("rank", _setting("adapter", "rank")), ("learning rate", _setting("train", "lr")),
    ("seed", _setting("train", "seed")), ("validation loss", lambda known: _loss(known.validation)),
    ("best of it", lambda known: _loss(known.best_validation)), ("KID ×10³ (95 %)", _kid), ("FD", _fd),
    ("effective rank", lambda known: number(facts.mean_rank(known), 3)),
    ("s/it", lambda known: number(known.overview.sec, 3)), ("peak memory", _memory),
    ("file", lambda known: _file(facts.result_of(known))),
)


def _unlike(known: Sequence[Facts]) -> Table:
    """What else the presets differ in."""
    shown = {"adapter.method", "adapter.rank", "train.lr", "train.seed"}
    names = sorted({name for other in known[1:] for name in facts.differing(known[0].preset, other.preset)} - shown)
    return [[name, *(_setting(*name.split(".", 1))(one) for one in known)] for name in names]


def _summary(known: Facts) -> Table:
    seen = known.overview
    return [["run", seen.name], ["state", seen.text], ["folder", known.path], ["started", _date(seen.started)],
            ["step", _steps(seen)], ["loss", f"{number(seen.loss)} (mean of the newest {facts.RECENT})"],
            ["time", f"{number(seen.sec, 3)} s/it"
                     + (f", {known.trained_sec / 60:.1f} min in all" if known.trained_sec else "")],
            ["peak memory", _memory(known)], ["on", known.device or "–"],
            ["checkpoints", ", ".join(map(str, known.checkpoints)) or "none"],
            *([["best", f"{best.get('step')}: {best.get('why', '')}"]] if (best := known.best) else []),
            *([["branch of", f"{known.origin['run']} at step {known.origin['step']}"]] if known.origin else [])]


def _measured(known: Facts) -> str:
    rows: Table = []
    if known.validation:
        rows += [["validation loss", f"{_loss(known.validation)}; first {_loss(known.first_validation)}; "
                                     f"best {_loss(known.best_validation)}"]]
    if known.distance:
        event = known.distance
        rows += [["KID ×10³ (95 %)", f"{_kid(known)}, {event.get('extractor')}, {event.get('n_gen')} generated and "
                                     f"{event.get('n_ref')} held-out pictures"], ["FD", _fd(known)]]
    if known.rank:
        groups = known.rank.get("erank") or {}
        rows += [[f"effective rank of {known.rank.get('rank')}",
                  ", ".join(f"{group} {number(value, 3)}" for group, value in groups.items())]]
    return table(rows) if rows else ""


def _changes(known: Facts) -> str:
    if not known.like:
        return ""
    lines = [f"  {name} = {_value(here)}  (there: {_value(there)})"
             for name, (there, here) in known.differences.items()]
    return "\n".join([f"preset: nearest to {known.like}, but for" if lines else f"preset: as {known.like}", *lines])


def _files(known: Facts) -> str:
    def verified(export: Export) -> str:
        error = export.worst_rel_error
        return "" if error is None else f"  read back: worst relative error {number(error, 2)}"

    lines = [f"  {export.file}  step {export.step}  {size(export.bytes)}  {export.format}{verified(export)}"
             for export in known.exports]
    return "\n".join(["files", *lines]) if lines else ""


def _own_notes(run: Run) -> str:
    lines = [f"  {line}" for line in notes.read(run).strip().splitlines()]
    return "\n".join(["own notes", *lines]) if lines else ""


def _told(known: Facts) -> str:
    lines = [*(f"  left out: {file}: {reason}" for file, reason in known.skipped.items()),
             *(f"  {note}" for note in known.notes)]
    return "\n".join(["notes", *lines]) if lines else ""
