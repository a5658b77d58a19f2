"""What requests of the tab "Data set" are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from app.components import Request

SetId = Annotated[str, Field(min_length=1, max_length=2000)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Names = Annotated[list[Name], Field(max_length=200_000)]
Text = Annotated[str, Field(max_length=1_000_000)]
Word = Annotated[str, Field(max_length=2000)]


class OfSet(Request):
    id: SetId


class OfImage(OfSet):
    name: Name


class OfImages(OfSet):
    names: Names
