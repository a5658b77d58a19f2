"""The tab "Compare": runs side by side, which differences count, and comparisons made from one preset."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from app import shelves
from app.comparing import MOST, Comparing, card_of
from app.components import Answer, Compare, Request, server_function
from app.jobs import Jobs
from trainer import sweep
from trainer.schema import METHOD_LR
from trainer.sweep import Sweep

Name = Annotated[str, Field(min_length=1, max_length=200)]
Names = Annotated[list[Name], Field(max_length=MOST)]
Tag = Annotated[str, Field(max_length=64)]
Listed = Annotated[str, Field(max_length=1000)]
METHODS = tuple(METHOD_LR)


class Nothing(Request):
    pass


class ListCompared(Request):
    seen: Tag = ""


class ReadCompared(Request):
    runs: Names
    cursors: Annotated[dict[Name, Tag], Field(max_length=MOST)] = {}
    seen: Tag = ""


class MakeReport(Request):
    runs: Annotated[Names, Field(min_length=1)]
    title: Annotated[str, Field(max_length=200)] = ""


class MakeCard(Request):
    run: Name


class PlanSweep(Request):
    shelf: Literal["shipped", "own"]
    name: Annotated[str, Field(max_length=200)]  # of the preset
    methods: Annotated[list[Literal[METHODS]], Field(max_length=len(METHODS))]
    ranks: Listed = ""
    rates: Listed = ""
    seeds: Listed = ""
    title: Annotated[str, Field(max_length=100)] = ""  # of the comparison


def build(jobs: Jobs) -> None:
    """Lay the tab out."""
    Compare(functions(jobs, Comparing(jobs)), data={"methods": METHODS, "most": MOST}, elem_id="compare")


def functions(jobs: Jobs, comparing: Comparing) -> list:
    """What the page may call."""
    return [
        server_function("list_compared", ListCompared, lambda asked: comparing.listing(asked.seen)),
        server_function("read_compared", ReadCompared,
                        lambda asked: comparing.read(asked.runs, asked.cursors, asked.seen)),
        server_function("make_report", MakeReport, lambda asked: comparing.report(asked.runs, asked.title)),
        server_function("make_card", MakeCard, lambda asked: card_of(jobs.places.run(asked.run))),
        server_function("list_bases", Nothing, lambda asked: shelves.names(jobs.places)),
        server_function("plan_sweep", PlanSweep, lambda asked: _shown(plan(jobs, asked))),
        server_function("start_sweep", PlanSweep, lambda asked: start(jobs, asked))]


def plan(jobs: Jobs, asked: PlanSweep) -> Sweep:
    """The runs that a comparison would be; nothing is written."""
    choice = sweep.parse(" ".join(asked.methods), asked.ranks, asked.rates, asked.seeds)
    return sweep.plan(jobs.places.workspace, shelves.find(jobs.places, asked.shelf, asked.name), choice,
                      name=asked.title.strip() or None)


def start(jobs: Jobs, asked: PlanSweep) -> Answer:
    """Put all of its runs into the queue."""
    made = sweep.start(jobs.places.workspace, plan(jobs, asked))
    jobs.serve_queue()
    return {"name": made.name, "runs": made.runs}


def _shown(planned: Sweep) -> Answer:
    return {"name": planned.name, "shape": sweep.shape(planned), "runs": [one.name for one in planned.runs],
            "seconds": planned.seconds, "known": planned.known, "remarks": planned.remarks}
