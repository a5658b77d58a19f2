"""Writes a run's LoRA file, reads it back, and says how true to the live adapter it is."""

from __future__ import annotations

import time
from pathlib import Path

from trainer.checkpoint import Progress
from trainer.errors import UserError
from trainer.export import metadata, verify, writer
from trainer.session import Session


def publish(session: Session, path: Path) -> None:
    """Export the adapter to `path`; an `export` event carries the verdict of reading the file back."""
    preset, weights = session.preset, session.shown_weights
    dtype = preset.output.dtype if preset.output.dtype != "auto" else session.family.EXPORT_DTYPE
    path.parent.mkdir(exist_ok=True)
    written = writer.write(path, session.adapter.pairs(weights), family=preset.model.family, dtype=dtype,
                           metadata=facts(session, path.stem))
    comparison = verify.compare(path, session.adapter.pairs(weights), family=preset.model.family)
    session.recorder.event(
        "export", step=session.progress.step, path=str(path.relative_to(session.run.path)), format=written.format,
        weights=weights, dtype=dtype, bytes=written.bytes, worst_rel_error=comparison.worst_rel_error,
        unmatched=comparison.unmatched, zero=comparison.zero)
    if comparison.unmatched:
        raise UserError(f"{path}: the exported file does not hold the trained adapter: {comparison.unmatched[:5]}")
