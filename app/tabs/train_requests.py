"""What the page may ask of the tab "Train"."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from app.components import Request
from app.hardest import MOST
from app.jobs import Order, QueueOrder
from trainer.notes import MOST as LONGEST_NOTES

Name = Annotated[str, Field(min_length=1, max_length=200)]
Step = Annotated[int, Field(ge=0, le=10**9)]
Tag = Annotated[str, Field(max_length=64)]


class Nothing(Request):
    pass


class ListRuns(Request):
    seen: Tag = ""  # the tag of the list that the page has


class ReadRun(Request):
    run: Name
    cursor: Tag = ""
    word: Annotated[str, Field(max_length=32)] = ""  # the state that the page shows
    seen: Tag = ""  # the tag of the notes and checkpoints that the page has


class OrderRun(Request):
    run: Name
    order: Order
    prompts: Annotated[list[Annotated[str, Field(max_length=2000)]], Field(max_length=50)] = []


class OrderQueue(Request):
    run: Name
    order: QueueOrder


class NameRun(Request):
    run: Name


class ReadHard(Request):
    run: Name
    most: Annotated[int, Field(ge=1, le=MOST)] = MOST


class ReadSpectrum(Request):
    run: Name
    block: Annotated[str, Field(max_length=200)]
    step: Step


class SaveNotes(Request):
    run: Name
    text: Annotated[str, Field(max_length=LONGEST_NOTES)]
    before: Tag  # the tag of the text that it takes the place of


class PinCheckpoint(Request):
    run: Name
    step: Step
    pinned: bool


class BranchRun(Request):
    run: Name
    step: Step
    branch: Annotated[str, Field(max_length=200)] = ""  # its name; "": the first free one
    changes: Annotated[list[Annotated[str, Field(max_length=2000)]], Field(max_length=200)] = []


class RenameRun(Request):
    run: Name
    new: Name


class RestoreRun(Request):
    entry: Name
