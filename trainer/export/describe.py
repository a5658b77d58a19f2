"""What a LoRA file says of itself: its kind, its layers and its metadata, from the header and the alphas alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from trainer.export import texts
from trainer.export.formats import FAMILIES
from trainer.export.lora_file import LoraFile, open_lora

_LONGEST = 200  # letters of a text that are shown
_HIDDEN = (*texts.PICTURES, "ss_tag_frequency", texts.HISTORY)  # too long for a table
_MOST_TAGS = 20


def describe(path: Path) -> dict[str, Any]:
    """A file in words and numbers. Raises UserError for one that is no LoRA of a known family."""
    lora = open_lora(path)
    found = lora.metadata
    return {
        "path": str(path), "bytes": path.stat().st_size, "family": lora.family, "format": lora.format.name,
        "words": lora.format.words, "dtype": lora.dtype, "ranks": lora.ranks,
        "alphas": sorted(set(lora.alphas.values())), "layers": dict(_parts(lora)),
        "dora": any({"dora", "vector"} & entry.parts.keys() for entry in lora.entries.values()),
        "unknown": [*lora.unknown, *(name for tensors in lora.incomplete.values() for name in tensors)],
        "title": found.get("modelspec.title", ""), "author": found.get("modelspec.author", ""),
        "triggers": texts.triggers(found), "tags": texts.frequent_tags(found, _MOST_TAGS),
        "cover": "modelspec.thumbnail" in found or "ssmd_cover_images" in found,
        "history": texts.history(found),
        "metadata": {key: text[:_LONGEST] for key, text in sorted(found.items()) if key not in _HIDDEN},
    }


def _parts(lora: LoraFile) -> Counter[str]:
    """How many modules of each component the file changes."""
    return Counter(module.partition(".")[0] for entry in lora.entries.values() for module in entry.place.modules)


def as_text(about: dict[str, Any]) -> str:
    """The description for people."""
    layers = ", ".join(f"{count} of {part}" for part, count in about["layers"].items())
    lines = [
        f"{about['path']}: {about['bytes'] / 1e6:.1f} MB",
        f"  a LoRA for {FAMILIES[about['family']]}, format {about['format']} ({about['words']}), {about['dtype']}",
        f"  rank {_listed(about['ranks'])}, alpha {_listed(about['alphas']) or 'folded in'}; layers: {layers}",
    ]
    lines += ["  with DoRA magnitudes"] if about["dora"] else []
    lines += [f"  {len(about['unknown'])} tensors of which nothing is known"] if about["unknown"] else []
    for name in ("title", "author"):
        lines += [f"  {name}: {about[name]}"] if about[name] else []
    lines += [f"  trigger words: {', '.join(about['triggers'])}"] if about["triggers"] else []
    lines += [f"  most frequent tags: {', '.join(about['tags'])}"] if about["tags"] else []
    lines += ["  with a cover picture"] if about["cover"] else []
    lines += [f"  made by: {step['what']} {_step(step)}" for step in about["history"] if "what" in step]
    lines += ["", *(f"  {key} = {text}" for key, text in about["metadata"].items())] if about["metadata"] else [
        "  no metadata"]
    return "\n".join(lines)


def _step(step: dict[str, Any]) -> str:
    made_of = step.get("from")
    sources = [f"{one.get('name')}{_times(one)}"
               for one in (made_of if isinstance(made_of, list) else ()) if isinstance(one, dict)]
    rest = [f"{key} {value}" for key, value in step.items() if key not in ("what", "from")]
    return "; ".join(filter(None, [", ".join(rest), "of " + ", ".join(sources) if sources else ""]))


def _times(source: dict[str, Any]) -> str:
    weight = source.get("weight", "")
    return f" x {weight:g}" if isinstance(weight, int | float) else f" x {weight}" if weight else ""


def _listed(numbers: list[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers[:6]) + (" …" if len(numbers) > 6 else "")
