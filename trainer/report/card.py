"""The run card: all of one run as a file to share, with nothing private in it."""

from __future__ import annotations

from datetime import UTC, datetime

import tomlkit

from trainer import curves, facts
from trainer.curves import Curves, Shot
from trainer.facts import Export, Facts
from trainer.record import clock
from trainer.report import page, pictures, svg
from trainer.run import Run
from trainer.wording import number, size

MOST_STEPS = 6  # columns of samples, the base model among them
VERIFIED = ("Read back and compared with the trained weights", "Not compared with the trained weights")


def make(run: Run) -> str:
    """The run card as HTML."""
    known, drawn = facts.collect(run), curves.read(run)
    chosen = known.preset
    lead = (f"{chosen['model']['family']} · {chosen['adapter']['method']}, rank {chosen['adapter']['rank']} · "
            f"{_state(known)}")
    return page.document(known.overview.name, lead, [
        page.section("In short", page.facts(_numbers(known))), _curves(known, drawn), _distance(known),
        _samples(run, drawn.shots), _result(known), _changes(known), _data(known), machine([known]),
        page.folded("The whole preset", f"<pre>{page.escape(preset_text(known))}</pre>"), footer()])


def machine(runs: list[Facts]) -> str:
    """What the runs were trained on and with; each only once."""
    hardware = sorted({page.without_folders(one.hardware) for one in runs if one.hardware})
    names = list(dict.fromkeys(name for one in runs for name in one.versions))
    versions = [(name, ", ".join(sorted({one.versions[name] for one in runs if name in one.versions})))
                for name in names]
    return page.section("Hardware and versions", page.facts([("Trained on", "; ".join(hardware)), *versions]))


def preset_text(known: Facts) -> str:
    """The preset as TOML, folders of this computer cut down to their last parts."""
    document = tomlkit.document()
    for section, values in known.preset.items():
        table = tomlkit.table()
        for key, value in values.items():
            if value is not None:
                table[key] = page.shared(f"{section}.{key}", value)
        document[section] = table
    return tomlkit.dumps(document)


def footer() -> str:
    return f"<footer>Made on {datetime.now(UTC):%Y-%m-%d} (UTC). This file loads nothing from elsewhere.</footer>"


def _state(known: Facts) -> str:
    seen = known.overview
    word = "stopped early" if seen.state == "early" else seen.state
    return f"{word}, step {seen.step}" + (f" of {seen.steps}" if seen.steps and seen.steps != seen.step else "")


def _numbers(known: Facts) -> list[tuple[str, str]]:
    seen, distance, result = known.overview, known.distance or {}, facts.result_of(known)
    low, high = distance.get("kid_low"), distance.get("kid_high")
    interval = f" ({number(low, 3)} to {number(high, 3)})" if low is not None and high is not None else ""
    started = datetime.fromtimestamp(seen.started, UTC)
    return [("Trained on", f"{started:%Y-%m-%d}"), ("Steps", str(seen.step)),
            ("Time", clock(known.trained_sec) if known.trained_sec else ""),
            ("A step", f"{number(seen.sec, 3)} s" if seen.sec else ""),
            ("Peak GPU memory" if known.peak_vram else "Peak memory", size(known.peak_vram or known.peak_ram)),
            ("Validation loss", number(known.validation["loss"]) if known.validation else ""),
            ("KID ×10³ (95 %)", f"{number(distance['kid'], 3)}{interval}" if distance.get("kid") is not None else ""),
            ("Effective rank", f"{number(facts.mean_rank(known), 3)} of {(known.rank or {}).get('rank', '?')}"
             if known.rank else ""),
            ("Best checkpoint", f"step {known.best['step']}" if known.best and "step" in known.best else ""),
            ("LoRA file", size(result.bytes) if result else "")]


def _curves(known: Facts, drawn: Curves) -> str:
    blue, amber, green = svg.style(0), svg.style(1), svg.style(2)
    losses = [svg.Line("Training, smoothed", blue, drawn.loss["step"], curves.smooth(drawn.loss))]
    losses += [svg.Line("Validation", amber, drawn.validation["step"], drawn.validation["loss"], has_dots=True)
               ] if drawn.validation["step"] else []
    rank = [svg.Line("Effective rank", green, drawn.rank["step"], drawn.rank["mean"])] if drawn.rank["step"] else []
    legend = "".join(f"<li>{svg.key(line.style)}{page.escape(line.label)}</li>" for line in losses)
    drawing = svg.lines("Loss", "Step", losses)
    return page.section("Curves", page.charts(
        page.chart("Loss", f'<ul class="legend">{legend}</ul>{drawing}' if drawing else ""),
        page.chart("Effective rank, mean of all layers", svg.lines("Effective rank", "Step", rank, bottom=0.0))))


def _distance(known: Facts) -> str:
    event = known.distance or {}
    if event.get("kid") is None:
        return ""
    bars = [svg.Bar("This LoRA", svg.style(0), event["kid"], event.get("kid_low"), event.get("kid_high"))]
    if event.get("base_kid") is not None:
        bars.append(svg.Bar("Base model", svg.style(7), event["base_kid"], event.get("base_kid_low"),
                            event.get("base_kid_high")))
    how = (f"{event.get('n_gen', '?')} generated against {event.get('n_ref', '?')} held-out images, extractor "
           f"{event.get('extractor', '?')}. FD {number(event.get('fd'))}, floor {number(event.get('fd_floor'))}.")
    return page.section("Distance to held-out images", page.charts(
        page.chart("KID ×10³ with its 95 % interval: lower is nearer", svg.intervals("KID ×10³", bars), how)))


def _samples(run: Run, shots: list[Shot]) -> str:
    groups = []
    for prompt, seed in dict.fromkeys((shot.prompt, shot.seed) for shot in shots):
        newest = {shot.step: shot for shot in shots if (shot.prompt, shot.seed) == (prompt, seed)}
        groups.append((prompt, [pictures.Picture(
            run.path / newest[step].file, f"{_at(step)}: {prompt}",
            _at(step) + (f", seed {seed}" if seed is not None else "")) for step in _spread(sorted(newest))]))
    shown, left_out = pictures.figures(groups)
    return page.section("Samples", shown, page.paragraph(_left_out(left_out), "small"))


def _left_out(count: int) -> str:
    return f"{count} more pictures were left out to keep this file small." if count else ""


def _at(step: int) -> str:
    return "Base model" if step == 0 else f"Step {step}"


def _spread(steps: list[int]) -> list[int]:
    """Some of the steps, the first and the last among them."""
    if len(steps) <= MOST_STEPS:
        return steps
    return [steps[round(place * (len(steps) - 1) / (MOST_STEPS - 1))] for place in range(MOST_STEPS)]


def _result(known: Facts) -> str:
    export = facts.result_of(known)
    if export is None:
        return ""
    about = [page.last_part(export.file), f"step {export.step}", size(export.bytes), export.dtype,
             f"format {export.format}" if export.format else ""]
    return page.section("The file, and what was verified", page.paragraph(" · ".join(filter(None, about))),
                        f'<ul class="plain">{"".join(_verified(export))}</ul>')


def _verified(export: Export) -> list[str]:
    def told(sign: str, kind: str, text: str) -> str:
        return f"<li>{page.tag(sign, kind)} {page.escape(page.without_folders(text))}</li>"

    lines = [told("read back", "good", f"{VERIFIED[0]}: worst relative error {number(export.worst_rel_error, 2)}.")
             if export.worst_rel_error is not None else told("not checked", "", f"{VERIFIED[1]}.")]
    if export.unmatched:
        lines.append(told("warning", "bad", f"{export.unmatched} of its keys match nothing in the model."))
    if export.readers:
        lines.append(told("read", "good", f"All of it is read, at full strength, by {', '.join(export.readers)}."))
    return lines + [told("note", "warn", f"{text}.") for text in export.others]


def _changes(known: Facts) -> str:
    rows = [[page.escape(name), page.escape(page.shown_value(name, here)), page.escape(page.shown_value(name, there))]
            for name, (there, here) in known.differences.items()]
    if not known.like:
        return ""
    title = f"Settings that differ from {known.like}" if rows else f"Settings: as {known.like}"
    return page.section(title, page.table(["Setting", "Here", "There"], rows, "left") if rows
                        else page.paragraph("Nothing was changed."))


def _data(known: Facts) -> str:
    data = known.data or {}
    skipped = [f"<li>{page.escape(page.last_part(page.without_folders(file)))}: "
               f"{page.escape(page.without_folders(reason))}</li>" for file, reason in known.skipped.items()]
    return page.section("Data set", page.facts([
        ("Images", str(data.get("images", ""))), ("Held out", str(data.get("held_out", ""))),
        ("Hash of images and captions", str(data.get("sha256", ""))), ("Left out", str(len(skipped) or ""))]),
        f'<ul class="plain small">{"".join(skipped)}</ul>' if skipped else "")
