"""Follows several runs for the tab "Compare": only what is new, in few points, and the table when it changed."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app import feed
from app.components import Answer
from app.jobs import Jobs
from trainer import comparison, curves, facts, measures, sweep
from trainer.curves import Curves
from trainer.errors import UserError
from trainer.events import EventReader, rewind
from trainer.facts import Facts
from trainer.preset import read_toml
from trainer.report import card
from trainer.report import comparison as report
from trainer.run import Run
from trainer.schema import METHOD_LR
from trainer.wording import VERDICTS, claim

MOST = 50  # runs that are compared at once
FRESH = 5.0  # seconds for which the numbers of a run that goes on are not added up again
COSTS = ("time", "memory")


class Collected(NamedTuple):
    """A run's facts, and what its files were like."""

    stamp: tuple[int, int, int]
    at: float
    facts: Facts


class Comparing:
    """What the tab asks for.  Nothing is kept but what can be read again."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.places = jobs, jobs.places
        self._collected: dict[str, Collected] = {}
        self._chosen: dict[Path, tuple[int, list[Any]]] = {}

    def listing(self, seen: str) -> Answer:
        """All runs with what one chooses them by, and the comparisons that were made; nothing when that is known."""
        folder = self.places.runs
        rows = [[row.name, row.state.word, round(row.started), *self._choice(folder / row.name / "preset.toml")]
                for row in self.jobs.listing()]
        made = [[one.name, one.preset, one.runs] for one in sweep.listing(self.places.workspace)]
        tag = _tag([rows, made])
        return {} if tag == seen else {"tag": tag, "runs": rows, "comparisons": made}

    def read(self, names: Sequence[str], cursors: Mapping[str, str], seen: str) -> Answer:
        """What came of each run since its cursor, and the table when it is another one than the page has."""
        runs, waiting = self._found(names)
        answer: Answer = {"curves": {run.name: self._follow(run, cursors.get(run.name, "")) for run in runs},
                          "waiting": waiting, "alive": any(run.is_held() for run in runs) or bool(waiting)}
        table = self._table(runs)
        tag = _tag(table)
        return answer if tag == seen else answer | {"tag": tag, "table": table}

    def report(self, names: Sequence[str], title: str) -> Answer:
        """The report of runs as one HTML file."""
        runs, _ = self._found(names)
        if not runs:
            raise UserError("none of these runs has begun; there is nothing to report yet")
        name = title.strip() or "Comparison"
        return {"file": f"{re.sub(r'[^A-Za-z0-9 _-]+', '-', name)[:90]}.html", "html": report.make(runs, name)}

    def _found(self, names: Sequence[str]) -> tuple[list[Run], dict[str, str]]:
        """The runs that have a folder, and of the others why they have none."""
        found, waiting = [], {}
        for name in dict.fromkeys(names):
            try:
                found.append(self.places.run(name))
            except UserError:
                state = self.jobs.pending(name)
                waiting[name] = state.text if state else "is not there any more"
        return found, waiting

    def _follow(self, run: Run, cursor: str) -> dict[str, Any]:
        """New rows of a run's curves; all of them again when it was resumed, which voids some."""
        self.places.hand_out(run)
        inode = feed.inode_of(run.events)
        offset = feed.offset_of(cursor, inode, run.events)
        reader = EventReader(run.events, offset)
        events = reader.read()
        if is_resumed := offset > 0 and any(event["kind"] == "start" for event in events):
            reader = EventReader(run.events)
            events = reader.read()
        is_whole = offset == 0 or is_resumed
        found = curves.of_events(run, rewind(events))
        state = self.jobs.state(run)
        answer = {"cursor": f"{inode:x}-{reader.offset}", "state": [state.word, state.text], **_plain(found)}
        return answer | ({"reset": True, "folder": run.path.as_posix()} if is_whole else {})

    def _table(self, runs: Sequence[Run]) -> dict[str, Any]:
        known = [self._facts(run) for run in runs]
        findings = comparison.compare(known)
        rows = measures.table(known, findings)
        fronts = {cost: measures.pareto(rows, cost) for cost in COSTS}
        return {"measures": [[measure.key, measure.label] for measure in measures.MEASURES],
                "rows": [measures.as_plain(row) for row in rows],
                "fronts": {cost: [measures.BY_KEY[quality].label, [list(point) for point in points]]
                           for cost, (quality, points) in fronts.items() if points},
                "findings": [[finding.verdict, VERDICTS[finding.verdict], claim(finding), finding.why]
                             for finding in findings]}

    def _facts(self, run: Run) -> Facts:
        """A run's numbers; of one that goes on they may be some seconds old."""
        events, preset = _stat(run.events), _stat(run.preset)
        stamp = (*events, preset[0])
        old = self._collected.get(run.name)
        is_good = old is not None and (old.stamp == stamp or (run.is_held() and time.monotonic() - old.at < FRESH))
        if old is None or not is_good:
            old = self._collected[run.name] = Collected(stamp, time.monotonic(), facts.collect(run))
        return old.facts

    def _choice(self, preset: Path) -> list[Any]:
        """Method, rank, learning rate and seed from the bare TOML, read once."""
        changed = _stat(preset)[0]
        if self._chosen.get(preset, (-1, []))[0] != changed:
            self._chosen[preset] = changed, _choice(preset)
        return self._chosen[preset][1]


def card_of(run: Run) -> Answer:
    """The run card as one HTML file."""
    return {"file": f"{run.name}.html", "html": card.make(run)}


def _choice(preset: Path) -> list[Any]:
    try:
        told = read_toml(preset.read_text("utf-8"), preset.name)
        adapter, train = told.get("adapter", {}), told.get("train", {})
        method = str(adapter.get("method", "stella"))
        return [method, _whole(adapter.get("rank")), _rate(train.get("lr", METHOD_LR.get(method))),
                _whole(train.get("seed"))]
    except (OSError, ValueError, AttributeError, UserError):
        return ["", None, None, None]


def _plain(found: Curves) -> dict[str, Any]:
    """Curves for JSON, without what has nothing new."""
    tables = {"loss": found.loss, "validation": found.validation, "rank": found.rank}
    return {name: table for name, table in tables.items() if table["step"]} | (
        {"shots": [list(shot) for shot in found.shots]} if found.shots else {})


def _tag(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else None


def _rate(value: Any) -> float | None:
    return float(f"{value:.5g}") if isinstance(value, float) and 0 < value < 1e6 else None
