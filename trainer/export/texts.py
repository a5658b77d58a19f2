"""What a file made of others says of itself: their texts that still hold, how it was made, and what people add."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import preset
from trainer.errors import UserError
from trainer.export import metadata

HISTORY = "stiefel_studio_history"  # a JSON list of steps: what was done, to which files
OLD_TEXTS = ("ss_output_name", "sshs_", "modelspec.hash_sha256", "lora_adapter_metadata")  # of the other file
PICTURES = ("modelspec.thumbnail", "ssmd_cover_images")  # their letters may look like paths
_TRIGGERS = ("modelspec.trigger_phrase", "trained_words")
_PART = r"[^\s\"'\\/,;]+"  # a folder's name without blanks
_WIDE = r"[^\s\\/:*?\"'<>|,;](?:(?:[^\\/:*?\"'<>|,;\r\n\t]|(?<=\w)'(?=\w)|[,;](?= ))*[^\s\\/:*?\"'<>|,;])?"  # with them
_HOME = rf"(?:file:)?(?:[\\/]*[A-Za-z]:)?[\\/]+(?:{_PART}[\\/]+)*?(?i:home|users)[\\/]+"
_PATH = re.compile(rf"""(?<![\w/.\\])(?!(?<=:)//)(?:
    {_HOME}(?:(?:{_WIDE}[\\/]+)+|{_PART})                                   # whose name follows goes along
    |(?:file:[\\/]*(?:[A-Za-z]:[\\/]+)?|[A-Za-z]:[\\/]+|~[\\/]+)(?:{_WIDE}[\\/]+)+
    |\\\\[\w.$-]+[\\/]+(?:{_WIDE}[\\/]+)*
    |[\\/](?:{_PART}[\\/]+){{2,}}|[\\/]{_PART}[\\/]+(?=[^\s\\/]))""", re.VERBOSE)
_WHOLE_PATH = re.compile(r"(?:~|(?:file:[\\/]*)?[A-Za-z]:|file:|\\)?[\\/][^\n]*")
_HOME_ALONE = re.compile(rf"{_HOME}[^\\/]+[\\/]*")

Texts = dict[str, str]


@dataclass(frozen=True)
class Labels:
    """What to write over a file's own texts; empty: as it is."""

    title: str = ""
    author: str = ""
    triggers: tuple[str, ...] = ()
    cover: Path | None = None


def kept(texts: Mapping[str, str], *, paths: bool = False) -> Texts:
    """A file's texts without those that are of its very tensors, and the most frequent of very many tags.

    paths: folders of somebody's computer stay.
    """
    found = {key: text for key, text in texts.items() if not key.startswith(OLD_TEXTS)}
    if len(found.get("ss_tag_frequency", "")) > metadata.TAG_BYTES:
        found["ss_tag_frequency"] = _json(metadata.capped(_tags(found), metadata.TAG_BYTES))
    return found if paths else without_paths(found)


def without_paths(texts: Mapping[str, str]) -> Texts:
    """The texts with every path cut to its last part, and without those that are nothing but a folder."""
    return {key: cut for key, text in texts.items() if (cut := _without_paths(key, text)) or not text}


def with_step(texts: Mapping[str, str], what: str, **step: Any) -> Texts:  # noqa: ANN401 - what JSON holds
    """The texts with one more step in the history."""
    return dict(texts) | {HISTORY: _json([*history(texts), {"what": what, **step}])}


def history(texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """How a file was made, the first step first."""
    found = _parsed(texts.get(HISTORY, ""))
    return [step for step in found if isinstance(step, dict)] if isinstance(found, list) else []


def triggers(texts: Mapping[str, str]) -> list[str]:
    """The trigger words that a file names."""
    words = _parsed(texts.get("trained_words", ""))
    words = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
    phrase = texts.get("modelspec.trigger_phrase", "")
    return words or ([phrase] if phrase else [])


def joined(files: Sequence[Mapping[str, str]]) -> Texts:
    """What several files say alike, with the trigger words and tags of them all; each as `kept` has left it."""
    texts = {key: text for key, text in files[0].items() if all(other.get(key) == text for other in files)}
    words = list(dict.fromkeys(word for one in files for word in triggers(one)))
    tags: dict[str, Counter[str]] = {}
    for one in files:
        for folder, counts in _tags(one).items():
            tags.setdefault(folder, Counter()).update(counts)
    found = metadata.capped(tags, metadata.TAG_BYTES)
    sized = {key: "" for key in ("ss_network_dim", "ss_network_alpha") if any(key in one for one in files)}
    return texts | sized | _of_triggers(words) | ({"ss_tag_frequency": _json(found)} if found else {})


def _tags(texts: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """A file's tags by folder; what is not of that shape is left out."""
    found = _parsed(texts.get("ss_tag_frequency", ""))
    return {folder: {tag: count for tag, count in counts.items() if type(count) is int}
            for folder, counts in found.items() if isinstance(counts, dict)} if isinstance(found, dict) else {}


def frequent_tags(texts: Mapping[str, str], most: int) -> list[str]:
    """The tags that a file was trained on most often, over all of its folders."""
    total: Counter[str] = Counter()
    for counts in _tags(texts).values():
        total.update(counts)
    return [tag for tag, _ in total.most_common(most)]


def labelled(texts: Mapping[str, str], labels: Labels) -> Texts:
    """The texts with what a person has chosen. Raises UserError for a cover that is no picture."""
    result = dict(texts)
    result |= {"modelspec.title": labels.title} if labels.title else {}
    result |= {"modelspec.author": labels.author} if labels.author else {}
    result |= _of_triggers(labels.triggers)
    if labels.cover is not None:
        try:
            result |= metadata.cover_texts(labels.cover)
        except (OSError, ValueError):
            raise UserError(f"{labels.cover} cannot be read as a picture: give a PNG, JPEG or WebP as the cover"
                            ) from None
    return result


def _of_triggers(words: Sequence[str]) -> Texts:
    return dict(zip(_TRIGGERS, (", ".join(words), _json(list(words))))) if words else {}


def _without_paths(key: str, text: str) -> str:
    """A text in which every path is cut to its last part."""
    if key in PICTURES:
        return text
    if key == metadata.PRESET_KEY:
        try:
            return preset.dumps(metadata.without_paths(preset.parse(text, "preset.toml")))
        except (UserError, RecursionError):
            return ""
    parsed = _parsed(text) if text[:1] in ("{", "[") else None
    if parsed is None:
        return _cut(text)
    cleaned = _cleaned(parsed)
    return text if cleaned == parsed else _json(cleaned)


def _cleaned(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {_cut(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return _cut(value) if isinstance(value, str) else value


def _cut(text: str) -> str:
    whole = text.strip()
    if _WHOLE_PATH.fullmatch(whole) and len(re.split(r"[\\/]+", whole)) > 2:
        return "" if _HOME_ALONE.fullmatch(whole) else metadata.last_part(whole).strip()
    return _PATH.sub("", text)


def _parsed(text: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json(value: Any) -> str:  # noqa: ANN401
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
