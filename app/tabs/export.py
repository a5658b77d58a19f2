"""The tab "Export": a LoRA file for a program, checked and to download, and the workshop for LoRA files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.components import Answer, Exports, Request, server_function
from app.exporting import Exporting
from app.paths import Places
from trainer.errors import UserError
from trainer.export import formats

Id = Annotated[str, Field(min_length=1, max_length=1500)]
Word = Annotated[str, Field(max_length=500)]
Dtype = Literal["auto", "fp16", "bf16", "fp32"]
Weight = Annotated[float, Field(ge=-100, le=100)]
Share = Annotated[float, Field(gt=0, le=1)]
MOST = 8  # files of a merge


class Nothing(Request):
    pass


class OfFile(Request):
    id: Id


class ReadTask(Request):
    task: Annotated[str, Field(pattern=r"^\d{1,9}$")]


class Write(Request):
    name: Word  # of the new file
    dtype: Dtype = "auto"
    no_paths: bool = True  # folders of this computer are left out of its metadata


class StartExport(OfFile, Write):
    format: Literal[tuple(dict.fromkeys(name for names in formats.WRITTEN.values() for name in names))]
    title: Word = ""
    author: Word = ""
    triggers: Word = ""
    cover: Annotated[str, Field(max_length=100)] = ""


class StartResize(OfFile, Write):
    how: Literal["rank", "energy", "dynamic"]
    rank: Annotated[int, Field(ge=1, le=4096)] | None = None
    share: Share | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> StartResize:
        if (self.rank if self.how == "rank" else self.share) is None:
            raise ValueError("the number is missing")
        return self


class OfFiles(Request):
    ids: Annotated[list[Id], Field(min_length=1, max_length=MOST)]
    weights: Annotated[list[Weight], Field(min_length=1, max_length=MOST)]


class StartMerge(OfFiles, Write):
    rank: Annotated[int, Field(ge=1, le=4096)] | None = None


def build(places: Places) -> None:
    """Lay the tab out."""
    Exports(functions(Exporting(places)), elem_id="export")


def functions(exporting: Exporting) -> list:
    """What the page may call."""
    return [
        server_function("list_files", Nothing, lambda asked: exporting.sources()),
        server_function("look_at", OfFile, lambda asked: exporting.look(asked.id)),
        server_function("start_export", StartExport, lambda asked: start_export(exporting, asked)),
        server_function("start_check", OfFile, lambda asked: {
            "task": exporting.start(["verify", str(exporting.path(asked.id))])}),
        server_function("start_resize", StartResize, lambda asked: start_resize(exporting, asked)),
        server_function("start_merge", StartMerge, lambda asked: start_merge(exporting, asked)),
        server_function("start_comparison", OfFiles, lambda asked: start_comparison(exporting, asked)),
        server_function("read_task", ReadTask, lambda asked: exporting.progress(asked.task))]


def start_export(exporting: Exporting, asked: StartExport) -> Answer:
    """Write the file for a program, with its metadata."""
    arguments = ["convert", str(exporting.path(asked.id)), "--to", asked.format, *_written(asked)]
    for option in ("title", "author", "triggers"):
        if text := getattr(asked, option).strip():
            arguments.append(f"--{option}={text}")
    arguments += ["--cover", str(exporting.cover(asked.id, asked.cover))] if asked.cover else []
    return {"task": exporting.start(arguments, exporting.out(asked.name))}


def start_resize(exporting: Exporting, asked: StartResize) -> Answer:
    """Write the file at another rank."""
    number = asked.rank if asked.how == "rank" else asked.share
    arguments = ["resize", str(exporting.path(asked.id)), f"--{asked.how}", str(number), *_written(asked)]
    return {"task": exporting.start(arguments, exporting.out(asked.name))}


def start_merge(exporting: Exporting, asked: StartMerge) -> Answer:
    """Write several files as one."""
    if len(asked.ids) < 2:
        raise UserError("choose at least two files to merge")
    rank = ["--rank", str(asked.rank)] if asked.rank else []
    arguments = ["merge", *_weighted(exporting, asked), *rank, *_written(asked)]
    return {"task": exporting.start(arguments, exporting.out(asked.name))}


def start_comparison(exporting: Exporting, asked: OfFiles) -> Answer:
    """Measure how much two files overlap."""
    if len(asked.ids) != 2:
        raise UserError("choose two files to compare")
    return {"task": exporting.start(["compare", *_weighted(exporting, asked)])}


def _written(asked: Write) -> list[str]:
    """How the new file is written, as the command line takes it."""
    return ["--dtype", asked.dtype, *([] if asked.no_paths else ["--keep-paths"])]


def _weighted(exporting: Exporting, asked: OfFiles) -> list[str]:
    """The files and their weights, as the command line takes them."""
    if len(asked.weights) != len(asked.ids):
        raise UserError("give each file a weight")
    return [*(str(exporting.path(id)) for id in asked.ids), "--weights", *(f"{weight:.6f}" for weight in asked.weights)]
