"""The frame of a report: one HTML file that loads nothing, in the app's colours, for the screen and for paper."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from trainer import schema

PART = r"""[^\\/:*?"'<>|\n]"""  # a letter of a file's name
WHOLE_PATH = re.compile(rf"(?<![\w.:/\\])(?:file://)?(?:[A-Za-z]:|~)?[\\/](?:{PART}+[\\/])*({PART}*)")
STYLE = Path(__file__).with_name("report.css")


def document(title: str, lead: str, parts: Iterable[str]) -> str:
    """The whole file.  title and lead are text; parts are HTML that is escaped already; empty ones are left out."""
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{STYLE.read_text("utf-8")}</style>
</head>
<body>
<main>
<header><div class="mark"><i></i>Stiefel Studio</div><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>
{body}
</main>
</body>
</html>
"""


def section(title: str, *parts: str) -> str:
    """A card; "" without anything in it."""
    inner = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inner}\n</section>" if inner else ""


def folded(title: str, inner: str) -> str:
    return f'<details class="card"><summary>{escape(title)}</summary>{inner}</details>'


def paragraph(text: str, kind: str = "") -> str:
    return f"<p{_class(kind)}>{escape(text)}</p>" if text else ""


def tag(text: str, kind: str = "") -> str:
    return f'<span class="tag {kind}">{escape(text)}</span>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """head is text; cells are HTML, the first of each row its name."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "\n".join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
                      for first, *rest in rows)
    return (f'<div class="scroll" tabindex="0"><table{_class(kind)}><thead><tr>{columns}</tr></thead>'
            f"<tbody>{lines}</tbody></table></div>")


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names with their values, as text; those without a value are left out."""
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs if value)
    return f"<dl>{shown}</dl>" if shown else ""


def chart(title: str, drawing: str, note: str = "") -> str:
    """A chart under its name; "" without a drawing."""
    return f"<div><h3>{escape(title)}</h3>{drawing}{paragraph(note, 'small')}</div>" if drawing else ""


def charts(*made: str) -> str:
    shown = "".join(made)
    return f'<div class="charts">{shown}</div>' if shown else ""


# What is not for others


def without_folders(text: str) -> str:
    """A text in which whole paths are cut down to the names of their files."""
    return WHOLE_PATH.sub(r"\1", text)


def shared(name: str, value: Any) -> Any:
    """The value of a setting ("section.key") for others to read: of folders and files of this computer the last part.
    """
    section_name, _, key = name.partition(".")
    is_known = section_name in schema.SECTIONS and key in schema.SECTIONS[section_name].model_fields
    if not is_known or not schema.has_path(section_name, key):
        return value
    return [last_part(str(item)) for item in value] if isinstance(value, list) else last_part(str(value))


def shown_value(name: str, value: Any) -> str:
    """The same as text."""
    value = shared(name, "–" if value is None else value)
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def last_part(path: str) -> str:
    """Of a path on a disk its last part; a hub's id as it is."""
    for kind in (PurePosixPath, PureWindowsPath):
        pure: PurePath = kind(path)
        path = pure.name if pure.is_absolute() else path
    return path


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
