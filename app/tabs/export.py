"""The tab "Export": a LoRA file for a program, checked and to download, and the workshop for LoRA files."""

from __future__ import annotations

import atexit
from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.bases import Bases
from app.components import Answer, Exports, Request, server_function
from app.exporting import Exporting
from app.paths import Places
from app.tabs import export_try
from app.tabs.dataset import uploaded
from app.trying import Trying
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


class AddLora(Request):
    name: Word
    path: Annotated[str, Field(max_length=4000)]  # as the upload answered


class ReadTask(Request):
    task: Annotated[str, Field(pattern=r"^\d{1,12}$")]


class Write(Request):
    name: Word  # of the new file
    dtype: Dtype = "auto"
    no_paths: bool = True  # folders of this computer are left out of its metadata


class StartCheck(OfFile):
    base: Annotated[str, Field(max_length=1500)] = ""  # the model to check against; "": the family's usual sizes


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


class StartBake(OfFiles):
    base: Id
    name: Word  # of the new base model


class StartExtract(Write):
    base: Id
    tuned: Id
    rank: Annotated[int, Field(ge=1, le=4096)]
    share: Share = 1.0


def build(places: Places) -> None:
    """Lay the tab out."""
    exporting, bases = Exporting(places), Bases(places)
    trying = Trying(places, exporting, bases)
    atexit.register(trying.close)
    Exports([*functions(exporting, bases), *export_try.functions(trying)], elem_id="export")


def functions(exporting: Exporting, bases: Bases) -> list:
    """What the page may call."""
    return [
        server_function("list_files", Nothing, lambda asked: exporting.sources()),
        server_function("look_at", OfFile, lambda asked: exporting.look(asked.id)),
        server_function("start_export", StartExport, lambda asked: start_export(exporting, asked)),
        server_function("add_lora", AddLora, lambda asked: {"id": exporting.add(asked.name, uploaded(asked.path))}),
        server_function("list_bases", Nothing, lambda asked: bases.listing()),
        server_function("start_check", StartCheck, lambda asked: start_check(exporting, bases, asked)),
        server_function("start_resize", StartResize, lambda asked: start_resize(exporting, asked)),
        server_function("start_merge", StartMerge, lambda asked: start_merge(exporting, asked)),
        server_function("start_comparison", OfFiles, lambda asked: start_comparison(exporting, asked)),
        server_function("start_bake", StartBake, lambda asked: start_bake(exporting, bases, asked)),
        server_function("start_extract", StartExtract, lambda asked: start_extract(exporting, bases, asked)),
        server_function("read_task", ReadTask, lambda asked: exporting.progress(asked.task)),
        server_function("cancel_task", ReadTask, lambda asked: cancel_task(exporting, asked))]


def start_check(exporting: Exporting, bases: Bases, asked: StartCheck) -> Answer:
    """Examine a file, against a base model when one is named."""
    base = ["--base", str(bases.path(asked.base))] if asked.base else []
    return {"task": exporting.start(["verify", str(exporting.path(asked.id)), *base])}


def start_bake(exporting: Exporting, bases: Bases, asked: StartBake) -> Answer:
    """Write a base model with LoRAs in it."""
    base = bases.path(asked.base)
    out = exporting.model_out(asked.name, folder=base.is_dir())
    return {"task": exporting.start(["bake", str(base), *_weighted(exporting, asked)], out)}


def start_extract(exporting: Exporting, bases: Bases, asked: StartExtract) -> Answer:
    """Write the difference of two base models as a LoRA."""
    base, tuned = bases.path(asked.base), bases.path(asked.tuned)
    if base.resolve() == tuned.resolve():
        raise UserError("choose two different base models")
    arguments = ["extract", str(base), str(tuned), "--rank", str(asked.rank), "--energy", f"{asked.share:.6f}",
                 "--dtype", asked.dtype]
    return {"task": exporting.start(arguments, exporting.out(asked.name))}


def cancel_task(exporting: Exporting, asked: ReadTask) -> Answer:
    """End a tool at work."""
    exporting.cancel(asked.task)
    return {}


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
