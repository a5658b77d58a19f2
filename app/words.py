"""Says events in words, for a person who was not looking when they happened."""

from __future__ import annotations

from typing import Any

from trainer.events import Event, devices

Note = list[Any]  # unix seconds, step or None, "plain" | "good" | "bad", text


def notes(events: list[Event]) -> list[Note]:
    """What is worth telling of these events, in their order."""
    told = ((event, TELL[event["kind"]](event)) for event in events if event.get("kind") in TELL)
    return [[event.get("t"), event.get("step"), *what] for event, what in told]


def machine(start: Event) -> str:
    """Where a run runs: "2 × NVIDIA L4, torch 2.13.0, box"."""
    if not start:
        return ""
    parts = [devices(start)]
    parts += [f"torch {start['torch']}"] if start.get("torch") else []
    parts += [str(start["host"])] if start.get("host") else []
    return ", ".join(part for part in parts if part)


def size(count: Any) -> str:
    """Bytes for a person: 3.1 MB."""
    amount = float(count) if isinstance(count, (int, float)) else 0.0
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB"


def count_of(unmatched: Any) -> int:
    """How many keys of an export had no match: the event holds them, or their number."""
    if isinstance(unmatched, (list, dict)):
        return len(unmatched)
    return unmatched if isinstance(unmatched, int) else 0


def _start(event: Event) -> tuple[str, str]:
    step, source = event.get("step") or 0, event.get("from")
    if isinstance(source, dict):
        return "plain", f"began as a branch of {source.get('run', '?')} at step {source.get('step', '?')}"
    return "plain", f"resumed from step {step}" if step else f"started, {event.get('steps', '?')} steps to go"


def _checkpoint(event: Event) -> tuple[str, str]:
    return "plain", f"saved a checkpoint ({size(event.get('bytes'))})"


def _export(event: Event) -> tuple[str, str]:
    return "good", f"wrote {event.get('path', 'the result')}"


def _distance(event: Event) -> tuple[str, str]:
    return "plain", f"measured the distance to the held-out images with {event.get('n_gen', '?')} generated ones"


def _end(event: Event) -> tuple[str, str]:
    if event.get("reason") == "error":
        return "bad", f"failed: {event.get('error') or 'see trainer.log'}"
    if event.get("reason") == "early":
        return "good", f"stopped early: {event['text']}" if event.get("text") else "stopped early"
    return ("good", "done") if event.get("reason") == "done" else ("plain", "stopped on request")


def _best(event: Event) -> tuple[str, str]:
    return "good", f"the best checkpoint so far: {event['why']}" if event.get("why") else "the best checkpoint so far"


def _prompts(event: Event) -> tuple[str, str]:
    count = count_of(event.get("prompts"))
    return "plain", f"draws {count} prompt{'s' if count != 1 else ''} from now on: the prompts were changed"


def _plain(word: str) -> Any:
    return lambda event: ("plain", word if not event.get("text") else str(event["text"]))


TELL = {
    "start": _start, "checkpoint": _checkpoint, "export": _export, "distance": _distance, "end": _end,
    "best": _best, "prompts": _prompts,
    "paused": _plain("paused"), "resumed": _plain("goes on"), "note": _plain("note"),
}
