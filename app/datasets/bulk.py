"""Changes many captions at once: first shown, then made as one entry of the journal."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from app.datasets import diff
from app.datasets.changes import Write, content
from app.datasets.data_set import DataSet
from app.datasets.index import Record
from app.datasets.operations import LONGEST, Operation
from trainer import captions
from trainer.errors import UserError

Answer = dict[str, Any]
MOST = 200  # changes shown at once


class Plan(NamedTuple):
    """What an operation would do."""

    changed: list[tuple[Record, str]]  # with the new text; one image for each caption file
    of: int
    hits: int
    token: str  # of the operation and of all captions as they were seen


def preview(data_set: DataSet, operation: Operation, names: Sequence[str] | None = None, start: int = 0,
            count: int = 20) -> Answer:
    """How many captions would change, and some of them before and after; nothing is written."""
    data_set.index.refresh()
    plan = _plan(data_set, operation, names)
    shown = plan.changed[max(0, start):max(0, start) + min(count, MOST)]
    changes = [{"name": record.name, "before": record.caption, "after": text,
                "spans": diff.spans(record.caption, text)} for record, text in shown]
    return {"changed": len(plan.changed), "of": plan.of, "hits": plan.hits, "changes": changes, "token": plan.token}


def apply(data_set: DataSet, operation: Operation, names: Sequence[str] | None, token: str) -> Answer:
    """Make the change that was previewed; `stale` when captions have changed since then, with nothing written."""
    with data_set.journal.held():
        data_set.index.refresh(at_once=True)
        plan = _plan(data_set, operation, names)
        if plan.token != token:
            return {"stale": True, **data_set.state()}
        if not plan.changed:
            return {"changed": 0, **data_set.state()}
        writes = []
        for record, text in plan.changed:
            data = content(data_set.root, record.sidecar)
            writes.append(Write(record.sidecar, data, captions.encode(text, like=data or b"")))
        return {"changed": len(writes), **data_set.change(operation.what(), writes)}


def _plan(data_set: DataSet, operation: Operation, names: Sequence[str] | None) -> Plan:
    seen: dict[str, Record] = {}
    for record in data_set.records(names):
        if not record.fault:
            seen.setdefault(record.sidecar, record)
    digest = hashlib.sha256(operation.model_dump_json().encode())
    edit = operation.editor(data_set.index.tag_counts())
    changed, hits = [], 0
    for sidecar, record in seen.items():
        digest.update(f"{sidecar}\0{record.version}\0".encode())
        text, places = edit(record.caption)
        if text != record.caption:
            if len(text) > LONGEST:
                raise UserError(f"{record.name}: its caption would have {len(text)} characters; the most is {LONGEST}")
            changed.append((record, text))
            hits += places
    return Plan(changed, len(seen), hits, digest.hexdigest()[:24])
