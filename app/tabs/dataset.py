"""The tab "Data set": images with their captions in a grid, and every change to them."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Annotated, Any

from gradio.utils import get_upload_folder
from pydantic import Field

from app.captioning import Captioning
from app.components import Answer, DataSets, Request, server_function
from app.datasets import tokens
from app.datasets.data_set import DataSet
from app.datasets.index import Filter, Sort
from app.datasets.library import Library
from app.paths import inside
from app.tabs import dataset_tools
from app.tabs.dataset_requests import Name, Names, OfImage, OfImages, OfSet, SetId, Text
from trainer.errors import UserError

MOST_SHOWN = 300  # cards of one request
LARGEST_MASK = 100_000_000  # letters of base64

Found = Annotated[list[Name], Field(max_length=MOST_SHOWN)]


class Nothing(Request):
    pass


class CreateSet(Request):
    name: Annotated[str, Field(max_length=200)]


class CopySet(CreateSet):
    id: SetId


class ListImages(OfSet):
    search: Annotated[str, Field(max_length=2000)] = ""
    filter: Filter = "all"
    sort: Sort = "name"
    tag: Annotated[str, Field(max_length=2000)] = ""
    names: Names | None = None
    too_small: Annotated[int, Field(ge=1, le=100_000)] = 512


class ReadCards(OfSet):
    names: Found


class SaveCaption(OfImage):
    text: Text
    version: Annotated[str, Field(max_length=64)]


class CountTokens(Request):
    texts: Annotated[list[Text], Field(max_length=MOST_SHOWN)]


class ListTags(OfSet):
    prefix: Annotated[str, Field(max_length=200)] = ""


class ExcludeImages(OfImages):
    excluded: bool


class MoveImages(OfImages):
    folder: Annotated[str, Field(max_length=500)]


class SendImages(OfImages):
    to: SetId
    keep: bool


class Uploaded(Request):
    name: Name
    path: Annotated[str, Field(max_length=4000)]  # as the upload answered


class AddFiles(OfSet):
    files: Annotated[list[Uploaded], Field(min_length=1, max_length=100_000)]


class RestoreFiles(OfSet):
    keys: Names


class Turn(OfSet):
    entry: Annotated[int, Field(ge=1)]  # as the page shows it
    skip_changed: bool = False


class SaveMask(OfImage):
    png: Annotated[str, Field(max_length=LARGEST_MASK)] | None  # base64; None takes the mask away
    version: Annotated[str, Field(max_length=64)] | None = None  # of the mask that was drawn on


def build(library: Library) -> None:
    """Lay the tab out."""
    tasks = Captioning(library.places)
    DataSets([*_of_library(library), *_of_images(library), *_of_changes(library),
              *dataset_tools.functions(library, tasks)], data=dataset_tools.offered(tasks), elem_id="dataset")


def _of_library(library: Library) -> list[Any]:
    return [
        server_function("list_sets", Nothing, lambda asked: library.list_sets()),
        server_function("browse_folder", OfSet, lambda asked: library.browse(asked.id)),
        server_function("create_set", CreateSet, lambda asked: library.create(asked.name)),
        server_function("copy_set", CopySet, lambda asked: library.copy_in(asked.id, asked.name))]


def _of_images(library: Library) -> list[Any]:
    """What is only looked at."""
    def of(asked: OfSet) -> DataSet:
        return library.open(asked.id)

    return [
        server_function("read_info", OfSet, lambda asked: of(asked).info()),
        server_function("list_images", ListImages, lambda asked: of(asked).list_images(
            asked.search, asked.filter, asked.sort, asked.tag, asked.names, too_small=asked.too_small)),
        # Passes over names that are gone
        server_function("read_cards", ReadCards,
                        lambda asked: of(asked).list_images(names=asked.names, count=MOST_SHOWN)),
        server_function("read_thumbs", ReadCards, lambda asked: of(asked).thumbs(asked.names)),
        server_function("read_large", OfImage, lambda asked: of(asked).large(asked.name)),
        server_function("read_mask", OfImage, lambda asked: of(asked).mask(asked.name)),
        server_function("read_trash", OfSet, lambda asked: of(asked).trash()),
        server_function("list_tags", ListTags, lambda asked: of(asked).tags(asked.prefix)),
        server_function("count_tokens", CountTokens, lambda asked: {"counts": tokens.count(asked.texts)})]


def _of_changes(library: Library) -> list[Any]:
    """Each is one entry of the data set's journal."""
    def of(asked: OfSet) -> DataSet:
        return library.open(asked.id)

    return [
        server_function("save_caption", SaveCaption,
                        lambda asked: of(asked).save_caption(asked.name, asked.text, asked.version)),
        server_function("exclude_images", ExcludeImages, lambda asked: of(asked).exclude(asked.names, asked.excluded)),
        server_function("delete_images", OfImages, lambda asked: of(asked).delete(asked.names)),
        server_function("move_images", MoveImages, lambda asked: of(asked).move(asked.names, asked.folder)),
        server_function("send_images", SendImages,
                        lambda asked: of(asked).send(asked.names, library.open(asked.to), asked.keep)),
        server_function("add_files", AddFiles, lambda asked: add_files(of(asked), asked)),
        server_function("save_mask", SaveMask,
                        lambda asked: of(asked).save_mask(asked.name, decoded(asked.png), asked.version)),
        server_function("restore_files", RestoreFiles, lambda asked: of(asked).restore(asked.keys)),
        server_function("empty_trash", OfSet, lambda asked: of(asked).empty_trash()),
        server_function("undo_change", Turn, lambda asked: of(asked).undo(asked.entry, asked.skip_changed)),
        server_function("redo_change", Turn, lambda asked: of(asked).redo(asked.entry, asked.skip_changed))]


def add_files(data_set: DataSet, asked: AddFiles) -> Answer:
    """Take uploaded files in, and drop the uploads."""
    files = [(file.name, uploaded(file.path)) for file in asked.files]
    try:
        return data_set.add_files(files)
    finally:
        for _, path in files:
            path.unlink(missing_ok=True)


def uploaded(path: str) -> Path:
    """The file of an upload.  Raises `UserError` for a path that no upload has answered with."""
    root = Path(get_upload_folder()).resolve()
    try:
        name = Path(path).resolve().relative_to(root).as_posix()
    except ValueError:
        raise UserError("that file was not uploaded here; add it again") from None
    found = inside(root, name)
    if not found.is_file():
        raise UserError("an uploaded file is not there any more; add the files again")
    return found


def decoded(png: str | None) -> bytes | None:
    try:
        return None if png is None else base64.b64decode(png, validate=True)
    except binascii.Error:
        raise UserError("the mask did not arrive whole; save it again") from None


