"""What the section "Try it" of the tab "Export" may ask for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from app.components import Answer, Request, server_function
from app.trying import Trying

Id = Annotated[str, Field(min_length=1, max_length=1500)]
Text = Annotated[str, Field(max_length=10_000)]
Side = Annotated[int, Field(ge=0, le=4096)]


class AboutTry(Request):
    id: Id


class DrawTry(Request):
    id: Id
    base: Id
    prompt: Text
    negative: Text = ""
    strength: Annotated[float, Field(ge=-4, le=4)] = 1.0
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 1
    steps: Annotated[int, Field(ge=0, le=200)] = 0
    guidance: Annotated[float, Field(ge=0, le=50)] | None = None
    width: Side = 0
    height: Side = 0
    without: bool = True


class ReadTry(Request):
    task: Annotated[str, Field(pattern=r"^\d{1,9}$")]
    request: Annotated[int, Field(ge=1, le=10**9)]


class StopTry(Request):
    task: Annotated[str, Field(pattern=r"^\d{1,9}$")]


def functions(trying: Trying) -> list:
    """What the page may call."""
    return [
        server_function("about_try", AboutTry, lambda asked: trying.about(asked.id)),
        server_function("draw_try", DrawTry, lambda asked: trying.ask(
            asked.id, asked.base, asked.model_dump(exclude={"id", "base"}))),
        server_function("read_try", ReadTry, lambda asked: trying.read(asked.task, asked.request)),
        server_function("stop_try", StopTry, lambda asked: stop(trying, asked))]


def stop(trying: Trying, asked: StopTry) -> Answer:
    """Put the model away."""
    trying.stop(asked.task)
    return {}
