"""The tab "Train": the list of runs, and the run that is looked at, live."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

import gradio as gr
from pydantic import Field

from app import feed
from app.components import Answer, Request, RunList, RunView, server_function
from app.jobs import Jobs, Order, QueueOrder
from trainer import preset
from trainer.errors import UserError
from trainer.run import Run, State, free_name

DEMO = preset.SHIPPED / "demo.toml"
TROUBLE = ("failed", "crashed")

Name = Annotated[str, Field(min_length=1, max_length=200)]


class ListRuns(Request):
    seen: Annotated[str, Field(max_length=64)] = ""  # the tag of the list that the page has


class ReadRun(Request):
    run: Name
    cursor: Annotated[str, Field(max_length=64)] = ""
    word: Annotated[str, Field(max_length=32)] = ""  # the state that the page shows


class OrderRun(Request):
    run: Name
    order: Order
    prompts: Annotated[list[Annotated[str, Field(max_length=2000)]], Field(max_length=64)] = []


class OrderQueue(Request):
    run: Name
    order: QueueOrder


class NameRun(Request):
    run: Name


class Nothing(Request):
    pass


def build(jobs: Jobs) -> None:
    """Lay the tab out."""
    with gr.Row(elem_id="train"):
        RunList([server_function("list_runs", ListRuns, lambda asked: list_runs(jobs, asked)),
                 server_function("start_demo", Nothing, lambda asked: start_demo(jobs)),
                 server_function("order_queue", OrderQueue, lambda asked: order_queue(jobs, asked))],
                data={"hasDemo": DEMO.is_file()}, elem_id="runs")
        RunView([server_function("read_run", ReadRun, lambda asked: read_run(jobs, asked)),
                 server_function("order_run", OrderRun, lambda asked: order_run(jobs, asked)),
                 server_function("resume_run", NameRun, lambda asked: resume_run(jobs, asked))],
                elem_id="run")


def list_runs(jobs: Jobs, asked: ListRuns) -> Answer:
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


def read_run(jobs: Jobs, asked: ReadRun) -> Answer:
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
    answer: Answer = {"state": _said(state), **feed.read(run, asked.cursor)}
    if state.word != asked.word or early_end:
        answer |= _trouble(run, state, early_end)
    if answer.get("reset"):
        answer["folder"] = run.path.as_posix()
    return answer


def order_run(jobs: Jobs, asked: OrderRun) -> Answer:
    """Stop, pause, go on, save or sample."""
    prompts = [line for prompt in asked.prompts if (line := prompt.strip())]
    jobs.order(jobs.places.run(asked.run), asked.order, prompts)
    return {}


def resume_run(jobs: Jobs, asked: NameRun) -> Answer:
    """Go on with a run that is over or was killed."""
    jobs.resume(jobs.places.run(asked.run))
    return {}


def order_queue(jobs: Jobs, asked: OrderQueue) -> Answer:
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
