"""Where the emoji come from: packages, styles, captions, and the concepts taught and held out."""

from __future__ import annotations

import json
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Style:
    """One way of drawing emoji: `words` open every caption of it."""

    words: str
    package: str
    version: str


@dataclass(frozen=True)
class Drawing:
    """One emoji in one style, as its package draws it: SVG text, or the bytes of a WebP file."""

    style: str
    label: str
    tags: tuple[str, ...]
    group: int
    source: str | bytes


BASE_STYLES = {
    "noto": Style("noto style", "@iconify-json/noto", "1.2.9"),
    "twemoji": Style("twemoji style", "@iconify-json/twemoji", "1.2.5"),
    "fluent_flat": Style("fluent flat style", "@iconify-json/fluent-emoji-flat", "1.2.6"),
    "fluent_3d": Style("fluent 3d style", "@lobehub/fluent-emoji-3d", "1.1.0"),
}
# Never shown to the base model: it is what the demo's LoRA learns.
TARGET_STYLE = "openmoji"
STYLES = BASE_STYLES | {TARGET_STYLE: Style("openmoji style", "@iconify-json/openmoji", "1.2.29")}
CAPTIONS = ("emojibase-data", "17.0.0")

# emojibase groups: 0 smileys, 1 people, 3 animals and nature, 4 food, 5 travel, 6 activities, 7 objects.
# Left out: components (2), symbols (8) and flags (9), which are text and stripes rather than things.
PEOPLE = 1
GROUPS = frozenset({0, PEOPLE, 3, 4, 5, 6, 7})

CONCEPT = (
    "octopus", "penguin", "owl", "turtle", "butterfly", "elephant", "rabbit face", "frog", "tropical fish",
    "horse face", "lady beetle", "chicken",
    "umbrella", "guitar", "camera", "key", "light bulb", "teapot", "backpack", "balloon", "crown",
    "alarm clock", "rocket", "wrapped gift",
)  # fmt: skip
HELD_OUT = (
    "fox", "panda", "koala", "lion", "tiger face", "cow face", "pig face", "mouse face", "bear",
    "monkey face", "duck", "parrot", "flamingo", "snail", "crab", "whale", "shark", "honeybee",
    "sunflower", "tulip", "cactus", "mushroom",
    "red apple", "banana", "strawberry", "carrot", "hamburger", "pizza", "doughnut", "birthday cake",
    "ice cream", "hot beverage",
    "bus", "sailboat", "bicycle", "airplane", "house", "castle",
    "soccer ball", "teddy bear", "violin", "trumpet", "telephone", "laptop", "books", "pencil", "scissors",
    "hammer",
)  # fmt: skip


def caption(style: str | None, label: str, tags: tuple[str, ...]) -> str:
    """`"openmoji style, octopus, animal, creature, ocean"`; without a style it starts at the label."""
    words = [STYLES[style].words] if style else []
    return ", ".join([*words, label, *tags])


def varied_caption(drawing: Drawing, rng: random.Random) -> str:
    """A caption as a person might shorten it: some tags, in any order; now and then no style word."""
    tags = rng.sample(drawing.tags, rng.randint(0, len(drawing.tags)))
    return caption(drawing.style if rng.random() < 0.9 else None, drawing.label, tuple(tags))


def archive_name(package: str, version: str) -> str:
    """The file name that `npm pack` gives: `@iconify-json/noto`, `1.2.9` -> `iconify-json-noto-1.2.9.tgz`."""
    return f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"


def missing_archives(folder: Path) -> list[str]:
    """The `npm pack` command of every package that is not in `folder`."""
    wanted = [(style.package, style.version) for style in STYLES.values()] + [CAPTIONS]
    return [f"npm pack {name}@{version}" for name, version in wanted
            if not (folder / archive_name(name, version)).is_file()]  # fmt: skip


def _concepts(folder: Path) -> dict[str, tuple[str, tuple[str, ...], int]]:
    """Code points without variation selectors -> (label, tags, group), for the groups that are used."""
    with tarfile.open(folder / archive_name(*CAPTIONS)) as archive:
        entries = json.load(archive.extractfile("package/en/data.json"))
    found = {}
    for entry in entries:
        if entry.get("group") in GROUPS:
            label = entry["label"].lower().replace("’", "'")
            tags = tuple(tag.lower() for tag in entry["tags"] if tag.lower() != label)
            found[_plain(entry["hexcode"])] = (label, tags, entry["group"])
    return found


def _plain(code: str) -> str:
    """`2602-FE0F` -> `2602`: packages differ in whether they write the variation selector."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _svg_sources(archive: tarfile.TarFile) -> dict[str, str]:
    """Code points -> SVG text of an `@iconify-json` package."""
    names = json.load(archive.extractfile("package/chars.json"))
    icons = json.load(archive.extractfile("package/icons.json"))
    sources = {}
    for code, name in names.items():
        icon = icons["icons"].get(name)
        if icon:
            width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
            sources[_plain(code)] = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            )
    return sources


def _webp_sources(archive: tarfile.TarFile) -> dict[str, bytes]:
    """Code points -> bytes of the WebP files of a package that carries pictures."""
    return {_plain(Path(member.name).stem): archive.extractfile(member).read()
            for member in archive if member.name.endswith(".webp")}  # fmt: skip


def load_drawings(folder: Path, style: str) -> list[Drawing]:
    """Every captioned drawing of a style, in the order of its code points."""
    concepts = _concepts(folder)
    with tarfile.open(folder / archive_name(STYLES[style].package, STYLES[style].version)) as archive:
        sources = _webp_sources(archive) if style == "fluent_3d" else _svg_sources(archive)
    return [Drawing(style, *concepts[code], sources[code]) for code in sorted(sources) if code in concepts]
