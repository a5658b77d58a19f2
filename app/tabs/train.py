"""The tab "Train": the list of runs, and the run that is looked at, live."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import gradio as gr

from app import feed, run_details
from app.comparing import card_of
from app.components import Answer, RunList, RunView, server_function
from app.datasets.library import Library
from app.jobs import Jobs
from app.run_details import RunDetails
from app.tabs import train_requests as asks
from trainer import preset
from trainer.errors import UserError
from trainer.run import Run, State, free_name

DEMO = preset.SHIPPED / "demo.toml"
TROUBLE = ("failed", "crashed")


def build(jobs: Jobs, library: Library) -> None:
    """Lay the tab out."""
    details = RunDetails(library)
    places = jobs.places
    with gr.Row(elem_id="train"):
        RunList([server_function("list_runs", asks.ListRuns, lambda asked: list_runs(jobs, asked)),
                 server_function("start_demo", asks.Nothing, lambda asked: start_demo(jobs)),
                 server_function("order_queue", asks.OrderQueue, lambda asked: order_queue(jobs, asked))],
                data={"hasDemo": DEMO.is_file()}, elem_id="runs")
        RunView([server_function("read_run", asks.ReadRun, lambda asked: read_run(jobs, asked)),
                 server_function("read_hard", asks.ReadHard,
                                 lambda asked: details.hard(places.run(asked.run), asked.most)),
                 server_function("read_spectrum", asks.ReadSpectrum, lambda asked: run_details.spectrum(
                     places.run(asked.run), asked.block, asked.step)),
                 server_function("save_notes", asks.SaveNotes, lambda asked: run_details.save_notes(
                     places.run(asked.run), asked.text, asked.before)),
                 server_function("pin_checkpoint", asks.PinCheckpoint, lambda asked: pin_checkpoint(jobs, asked)),
                 server_function("branch_run", asks.BranchRun, lambda asked: {"run": jobs.branch(
                     places.run(asked.run), asked.step, asked.branch.strip(), asked.changes)}),
                 server_function("rename_run", asks.RenameRun, lambda asked: {"run": jobs.rename(
                     places.run(asked.run), asked.new)}),
                 server_function("delete_run", asks.NameRun, lambda asked: {"entry": jobs.delete(
                     places.run(asked.run))}),
                 server_function("restore_run", asks.RestoreRun, lambda asked: {"run": jobs.restore(asked.entry)}),
                 server_function("make_card", asks.NameRun, lambda asked: card_of(places.run(asked.run))),
                 server_function("order_run", asks.OrderRun, lambda asked: order_run(jobs, asked)),
                 server_function("resume_run", asks.NameRun, lambda asked: resume_run(jobs, asked))],
                elem_id="run")


def list_runs(jobs: Jobs, asked: asks.ListRuns) -> Answer:
    """All runs with their states, when the page has another list; how far the living ones are, always."""
    rows = jobs.listing()
    queue = {"waiting": [entry.name for entry in jobs.queue.waiting()],
             "failed": [[failure.name, failure.reason] for failure in jobs.queue.failures()]}
    shown = [[row.name, row.state.word, round(row.started), row.state.steps if not row.state.alive else 0,
              row.state.step if not row.state.alive else 0] for row in rows]
    tag = hashlib.sha256(json.dumps([shown, queue]).encode()).hexdigest()[:12]
    answer: Answer = {"live": {row.name: [row.state.step, row.state.steps] for row in rows if row.state.alive}}
    return answer if tag == asked.seen else answer | {"tag": tag, "rows": shown, "queue": queue}


def start_demo(jobs: Jobs) -> Answer:
    """Train the demo under the first free name."""
    if not DEMO.is_file():
        raise UserError(f"the demo is not here: {DEMO} is missing")
    starting = {row.name for row in jobs.listing() if row.state.alive}
    name = free_name(jobs.places.workspace, "demo", jobs.queue.names())
    if name in starting:  # it was started a moment ago and has no folder yet
        return {"run": name}
    jobs.start(DEMO, name)
    return {"run": name}


def read_run(jobs: Jobs, asked: asks.ReadRun) -> Answer:
    """The state of a run and what came since the cursor."""
    early_end = jobs.early_end(asked.run)
    try:
        run = jobs.places.run(asked.run)
    except UserError:
        state = jobs.pending(asked.run)
        if state is None:
            raise
        return {"state": _said(state), "trouble": early_end}
    jobs.places.hand_out(run)
    state = jobs.state(run)
    answer: Answer = {"state": _said(state), **feed.read(run, asked.cursor), **run_details.beside(run, asked.seen)}
    if state.word != asked.word or early_end:
        answer |= _trouble(run, state, early_end)
    if answer.get("reset"):
        answer["folder"] = run.path.as_posix()
        answer.setdefault("prompts", run_details.prompts(run))
    return answer


def order_run(jobs: Jobs, asked: asks.OrderRun) -> Answer:
    """Stop, pause, go on, save, sample, or sample other prompts from now on."""
    prompts = [line for prompt in asked.prompts if (line := prompt.strip())]
    jobs.order(jobs.places.run(asked.run), asked.order, prompts)
    return {}


def resume_run(jobs: Jobs, asked: asks.NameRun) -> Answer:
    """Go on with a run that is over or was killed."""
    return {"waits": jobs.resume(jobs.places.run(asked.run))}


def pin_checkpoint(jobs: Jobs, asked: asks.PinCheckpoint) -> Answer:
    """Keep a checkpoint whatever comes, or let it go with the others."""
    jobs.places.run(asked.run).pin(asked.step, asked.pinned)
    return {}


def order_queue(jobs: Jobs, asked: asks.OrderQueue) -> Answer:
    """Move a waiting run, take it out, put it back, or forget a failure."""
    jobs.order_queue(asked.run, asked.order)
    return {}


def _said(state: State) -> list[Any]:
    return [state.word, state.text, state.step, state.steps, state.alive]


def _trouble(run: Run, state: State, early_end: str) -> Answer:
    """What went wrong, and from where a resume would go on."""
    if early_end:
        return {"trouble": early_end, "saved": run.last_step()}
    if state.word in TROUBLE:
        return {"log": run.log_tail(), "saved": run.last_step()}
    return {"trouble": "", "log": "", "saved": run.last_step()}
