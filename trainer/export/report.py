"""Everything worth knowing of a LoRA file before it is used: what it is, what it changes, and who reads it how."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.export.consumers import CONSUMERS, READERS, Reading
from trainer.export.formats import FAMILIES
from trainer.export.lora_file import LoraFile, open_lora
from trainer.export.reading import Layer, Misfit, measure, misfits, read_whole
from trainer.export.sizes import Sizes, base_sizes, true_sizes


@dataclass(frozen=True)
class Report:
    """A file examined. `faults` are wrong for everybody, `notes` worth knowing; readings as asked for, and others."""

    path: Path
    family: str
    format: str
    words: str  # what that format is
    dtype: str
    ranks: list[int]
    alphas: list[float]
    model: str  # whose shapes the layers were compared with
    layers: list[Layer]
    misfits: list[Misfit]
    asked: list[Reading]
    others: list[Reading]
    faults: list[str]
    notes: list[str]

    @property
    def good(self) -> bool:
        """Whether every consumer asked for applies all of it, as it is meant."""
        return not self.faults and all(reading.whole for reading in self.asked)


def examine(path: Path, *, base: Path | None = None, consumers: Sequence[str] = ()) -> Report:
    """Read a whole LoRA file, one module at a time, and compare it with its model and with what programs accept.

    base: the model that it is for, a file or folder; None: the family's true sizes. consumers: those that must read
    all of it; none named: all that have the family. Raises UserError for what is no LoRA of a known family.
    """
    lora = open_lora(path)
    asked = list(consumers) or list(READERS[lora.family])
    layers, blocks = measure(lora)
    model, wrong = _compare_sizes(lora, base)
    readings = [read_whole(consumer, lora, layers, blocks, wrong) for consumer in CONSUMERS]
    return Report(path, lora.family, lora.format.name, lora.format.words, lora.dtype, lora.ranks,
                  sorted(set(lora.alphas.values())), model, layers, wrong,
                  [reading for reading in readings if reading.consumer in asked],
                  [reading for reading in readings if reading.consumer not in asked],
                  list(_faults(layers, model, wrong)), list(_notes(lora, layers)))


def _compare_sizes(lora: LoraFile, base: Path | None) -> tuple[str, list[Misfit]]:
    """Whose sizes fit best, by name, and where they do not."""
    if base is None:
        models: Mapping[str, Sizes] = true_sizes(lora.family)
    else:
        models = {base.name: base_sizes(base, lora.family)}
    found = {name: misfits(lora, sizes) for name, sizes in models.items()}
    best = min(found, key=lambda name: len(found[name]))
    return best, found[best]


def _faults(layers: Sequence[Layer], model: str, wrong: Sequence[Misfit]) -> Iterator[str]:
    if wrong:
        yield _misfit_text(wrong, len(layers), model)
    broken = [layer.key for layer in layers if not layer.finite]
    if broken:
        yield (f"numbers that are not finite in {len(broken)} layers, such as {broken[0]}: every program draws black "
               "or broken pictures. The training has diverged: export an earlier checkpoint")
    if layers and all(layer.idle for layer in layers):
        yield "all layers are zero: the file changes nothing. It was saved before any training step"
    if not layers:
        yield "no layer is whole: each lacks its up or its down"


def _notes(lora: LoraFile, layers: Sequence[Layer]) -> Iterator[str]:
    idle = [layer.key for layer in layers if layer.idle]
    if idle and len(idle) < len(layers):
        yield f"{len(idle)} layers change nothing (their weights are zero), such as {idle[0]}"
    if lora.format.ending == "kohya" and not lora.alphas:
        yield "there is no alpha beside the layers: every program applies them at full strength"
    if lora.format.name == "F1" and lora.family == "flux2":
        yield "ComfyUI reads this from version 0.11 on; for older ones, convert it to F6"
    if lora.header.begin > 1 << 20:
        yield "the header is larger than 1 MiB: ComfyUI shows none of its metadata"


def check_consumers(names: Sequence[str]) -> list[str]:
    """Consumers by the names that people type. Raises UserError for one that is not known."""
    unknown = [name for name in names if name not in CONSUMERS]
    if unknown:
        raise UserError(f"--for {unknown[0]}: choose of {', '.join(CONSUMERS)}")
    return list(names)


def as_text(report: Report) -> str:
    """The report for people."""
    count = len(report.layers)
    ranks, alphas = _listed(report.ranks), _listed(report.alphas) or "none"
    lines = [f"{report.path.name}: {FAMILIES[report.family]}, format {report.format} ({report.words})",
             f"  {count} layers, rank {ranks}, alpha {alphas}, {report.dtype}"]
    if not report.misfits:
        lines.append(f"  ok     every layer has the shape that {report.model} has")
    lines += [f"  FAULT  {fault}" for fault in report.faults]
    for reading in report.asked:
        lines += _reading_lines(reading, "FAULT", count)
    for reading in report.others:
        if reading.consumer in READERS[report.family]:
            lines += _reading_lines(reading, "note ", count)
    lines += [f"  note   {note}" for note in report.notes]
    live = [layer for layer in report.layers if layer.finite and not layer.idle]
    if live:
        lines += ["", "  norm        effective rank   layer"]
        lines += [f"  {layer.norm:<10.4g}  {layer.erank:6.1f} of {layer.rank:<4}   {layer.key}" for layer in live]
    return "\n".join(lines)


def _reading_lines(reading: Reading, word: str, count: int) -> list[str]:
    name = CONSUMERS[reading.consumer]
    if reading.whole:
        return [f"  ok     {name} reads all {count} layers at full strength"]
    return [f"  {word}  {name} {fault.text} ({len(fault.keys)} keys, such as {fault.keys[0][:100]})"
            for fault in reading.faults]


def _misfit_text(wrong: Sequence[Misfit], count: int, model: str) -> str:
    first = wrong[0]
    about = (f"{first.key} is for a layer that it has not" if first.expected is None else
             f"{first.key} is {' x '.join(map(str, first.found))} instead of {' x '.join(map(str, first.expected))}")
    whose = ("it may be for a base of other sizes: name that with --base" if len(wrong) == count else
             "no program can apply these")
    return f"{len(wrong)} of {count} layers do not fit {model}: {about}; {whose}"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:6]) + (" …" if len(values) > 6 else "")


def as_json(report: Report) -> dict[str, Any]:
    """The report for programs: numbers that are none become null.

    Of each consumer every key, with the share of the meant change that it applies (null: it applies another change).
    """
    def reading(one: Reading) -> dict[str, Any]:
        lost = {key: 0.0 for fault in one.faults for key in fault.keys if fault.strength == 0.0}  # unknown names too
        keys = {key: {"matched": strength != 0.0, "strength": strength}
                for key, strength in (lost | one.strengths).items()}
        return {"whole": one.whole, "faults": [asdict(fault) for fault in one.faults],
                "strengths": Counter(f"{value:g}" for value in one.strengths.values()), "keys": keys}

    plain = asdict(report) | {"path": str(report.path), "good": report.good,
                              "asked": {one.consumer: reading(one) for one in report.asked},
                              "others": {one.consumer: reading(one) for one in report.others}}
    return _without_nan(plain)


def _without_nan(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
