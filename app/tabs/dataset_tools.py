"""What the tab "Data set" does with all captions and images at once: bulk changes, overview, health, new captions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from app import captioning, form, shelves
from app.captioning import Captioning
from app.components import Answer, Request, server_function
from app.datasets import bulk, health, operations, overview, timesteps
from app.datasets.data_set import DataSet
from app.datasets.library import Library
from app.datasets.overview import Family, Handling
from app.tabs.dataset_requests import Name, Names, OfImage, OfSet, Word
from trainer import preset

Resolution = Annotated[int, Field(ge=64, le=4096)]
Number = Annotated[str, Field(pattern=r"^\d{1,9}$")]


class Bulk(OfSet):
    operation: dict[str, Any]
    names: Names | None = None


class PreviewBulk(Bulk):
    start: Annotated[int, Field(ge=0)] = 0


class ApplyBulk(Bulk):
    token: Annotated[str, Field(max_length=64)]


class ReadCaptions(OfSet):
    trigger: Word = ""


class ReadSizes(OfSet):
    resolution: Resolution
    family: Family
    buckets: bool
    batch: Annotated[int, Field(ge=1, le=100_000)]
    repeats: Annotated[int, Field(ge=1, le=1000)]


class ReadCrop(OfImage):
    resolution: Resolution
    family: Family
    buckets: bool


class Rehearse(OfSet):
    handling: dict[str, Any]
    seed: Annotated[int, Field(ge=0, lt=2**31)]


class CheckHealth(OfSet):
    trigger: Word = ""
    too_small: Annotated[int, Field(ge=1, le=100_000)] = 512


class ApplyRemedy(CheckHealth):
    kind: Annotated[str, Field(max_length=40)]


class ReadTraining(Request):
    shelf: Literal["shipped", "own"]
    name: Annotated[str, Field(max_length=200)]


class StartCaptioning(OfSet):
    settings: dict[str, Any]
    images: Names


class ReadCaptioning(OfSet):
    task: Number | None = None  # None: the newest of the data set
    start: Annotated[int, Field(ge=0)] = 0


class ChangeCaptioning(OfSet):
    task: Number


class ApplyCaptioning(ChangeCaptioning):
    images: Annotated[list[Name], Field(max_length=200_000)] | None = None


def functions(library: Library, tasks: Captioning) -> list[Any]:
    """The server functions of all panels."""
    def of(asked: OfSet) -> DataSet:
        return library.open(asked.id)

    return [
        server_function("preview_bulk", PreviewBulk, lambda asked: bulk.preview(
            of(asked), operations.parse(asked.operation), asked.names, asked.start)),
        server_function("apply_bulk", ApplyBulk, lambda asked: bulk.apply(
            of(asked), operations.parse(asked.operation), asked.names, asked.token)),
        server_function("read_captions", ReadCaptions, lambda asked: overview.captions(of(asked), asked.trigger)),
        server_function("read_sizes", ReadSizes, lambda asked: overview.sizes(
            of(asked), asked.resolution, asked.family, asked.buckets, asked.batch, asked.repeats)),
        server_function("read_crop", ReadCrop, lambda asked: overview.crop(
            of(asked), asked.name, asked.resolution, asked.family, asked.buckets)),
        server_function("rehearse_captions", Rehearse, lambda asked: overview.rehearse(
            of(asked), Handling.model_validate(asked.handling), asked.seed)),
        server_function("check_health", CheckHealth,
                        lambda asked: health.check(of(asked), asked.trigger, asked.too_small)),
        server_function("apply_remedy", ApplyRemedy,
                        lambda asked: health.remedy(of(asked), asked.kind, asked.trigger, asked.too_small)),
        server_function("list_trainings", OfSet, lambda asked: list_trainings(library, of(asked))),
        server_function("read_training", ReadTraining, lambda asked: read_training(library, asked)),
        *_of_captioning(library, tasks)]


def offered(tasks: Captioning) -> Answer:
    """What the captioning panel is made of."""
    return {"models": list(captioning.MODELS), "captioning": tasks.describe()}


def list_trainings(library: Library, data_set: DataSet) -> Answer:
    """The names of all presets, and of one's own the first that trains on this data set."""
    found = shelves.names(library.places)
    using = (name for name in found["own"] if _trains_on(library.places.presets / f"{name}.toml", data_set.root))
    return found | {"using": next(using, None)}


def _trains_on(file: Path, folder: Path) -> bool:
    values = form.values_of(preset.read_text(file)) or {}
    given = values.get("data", {}).get("folder", "")
    folders = given if isinstance(given, list) else [given]
    return any((file.parent / str(one)).resolve() == folder.resolve() for one in folders if one)


def read_training(library: Library, asked: ReadTraining) -> Answer:
    """What a preset says of how images and captions are trained on."""
    file = shelves.find(library.places, asked.shelf, asked.name)
    settings = preset.parse(preset.read_text(file), file.name)
    data, train = settings.data, settings.train
    return {
        "family": settings.model.family, "resolution": data.resolution, "buckets": data.buckets,
        "batch": train.batch_size * train.grad_accum, "repeats": data.repeats,
        "handling": {key: getattr(data, key) for key in Handling.model_fields},
        "timesteps": timesteps.histogram(settings.model.family, train.timestep_sampling, train.timestep_mean,
                                         train.timestep_scale, train.timestep_shift, data.resolution)}


def _of_captioning(library: Library, tasks: Captioning) -> list[Any]:
    def start(asked: StartCaptioning) -> Answer:
        settings = {**asked.settings, "images": asked.images}
        return {"task": tasks.start(library.open(asked.id).root, settings)}

    def read(asked: ReadCaptioning) -> Answer:
        name = asked.task or tasks.latest(library.open(asked.id).root)
        if name is None:
            return {"task": None}
        progress = tasks.progress(name)  # before the rows: at its end, what is read after it are all of them
        return {"task": name, **asdict(progress), "rows": captioning.as_rows(tasks.results(name, asked.start))}

    def stop(asked: ChangeCaptioning) -> Answer:
        tasks.cancel(asked.task)
        return {}

    def dismiss(asked: ChangeCaptioning) -> Answer:
        tasks.dismiss(asked.task)
        return {}

    return [
        server_function("start_captioning", StartCaptioning, start),
        server_function("read_captioning", ReadCaptioning, read),
        server_function("stop_captioning", ChangeCaptioning, stop),
        server_function("dismiss_captioning", ChangeCaptioning, dismiss),
        server_function("apply_captioning", ApplyCaptioning, lambda asked: tasks.apply(
            asked.task, library.open(asked.id), asked.images))]
