"""The report of a comparison: what is better, how sure that is, and all it rests on, as one file."""

from __future__ import annotations

from collections.abc import Sequence

from trainer import comparison, curves, facts, measures
from trainer.comparison import Finding, Setting
from trainer.curves import Curves
from trainer.facts import Facts
from trainer.measures import BY_KEY, MEASURES, Row
from trainer.report import card, page, pictures, svg
from trainer.report.svg import Style
from trainer.run import Run
from trainer.wording import VERDICTS, claim, number

TAGS = {"significant": "good", "noise": "", "unknown": "warn", "not comparable": "bad"}
KINDS = {"best": "good", "worse": "bad", "noise": "", "unknown": "warn"}
MOST_PROMPTS = 8
HELP = ("Validation loss is measured on held-out images, with the same noise for all runs of a seed: runs of one seed "
        "are compared as pairs, by Student's t.",
        "KID is the distance of generated pictures from held-out ones; with three shared seeds it is compared as "
        "pairs, else by the intervals of the runs, which do not know the noise between seeds.",
        "Where several settings are compared with the best one, the intervals are widened so that all of them hold "
        "together with 95 %. “No difference shown” is not “equal”: more seeds may show one.")


def make(runs: Sequence[Run], title: str = "Comparison") -> str:
    """The report as HTML."""
    known, drawn = [facts.collect(run) for run in runs], [curves.read(run) for run in runs]
    findings, settings = comparison.compare(known), comparison.named(known)
    rows = measures.table(known, findings)
    styles = {setting.name: svg.style(index) for index, setting in enumerate(settings)}
    by_run = {run.name: one for run, one in zip(runs, drawn)}
    lead = f"{_count(len(known), 'run')} of {_count(len(settings), 'setting')}, trained with Stiefel Studio"
    return page.document(title, lead, [
        page.section("What can be said", said(findings)), page.section("Side by side", side_by_side(rows, styles)),
        _curves(settings, by_run, styles),
        page.section("Quality and its cost", page.charts(_kid(known, settings, styles), *_fronts(rows, styles))),
        _samples(runs, settings, by_run),
        page.section("What the presets differ in", _differences(known)), _data(known), card.machine(known),
        page.section("How to read this", *(page.paragraph(text, "small") for text in HELP)), card.footer()])


def said(findings: Sequence[Finding]) -> str:
    """The findings in words."""
    if not findings:
        return page.paragraph("Nothing was measured on held-out images for two settings, so that nothing can be said "
                              "of which is better.")
    items = (f"<li>{page.tag(VERDICTS[finding.verdict], TAGS[finding.verdict])} {page.escape(claim(finding))} "
             f'<span class="small">{page.escape(finding.why)}</span></li>' for finding in findings)
    return f'<ul class="plain">{"".join(items)}</ul>'


def side_by_side(rows: Sequence[Row], styles: dict[str, Style]) -> str:
    """The numbers, a row a setting; columns that nobody has are left out."""
    shown = [measure for measure in MEASURES if any(row.cells[measure.key].value is not None for row in rows)]
    return page.table(["Setting", *(measure.label for measure in shown)],
                      [[_name(row, styles[row.name]), *(_cell(row, measure.key) for measure in shown)] for row in rows])


def _name(row: Row, style: Style) -> str:
    seeds = f"{len(row.runs)} runs" if len(row.runs) > 1 else ""
    return f"{svg.key(style)}{page.escape(row.name)}" + (f"<small> {seeds}</small>" if seeds else "")


def _cell(row: Row, key: str) -> str:
    cell = row.cells[key]
    parts = [f"<strong>{page.escape(cell.text)}</strong>" if cell.kind == "best" else page.escape(cell.text)]
    parts += [f"<small>{page.escape(cell.spread)}</small>"] if cell.spread else []
    parts += [page.tag(cell.verdict, KINDS[cell.kind])] if cell.verdict else []
    return "".join(parts)


def _curves(settings: Sequence[Setting], by_run: dict[str, Curves], styles: dict[str, Style]) -> str:
    legend = "".join(f"<li>{svg.key(styles[one.name])}{page.escape(one.name)}</li>" for one in settings)
    made = {"Validation loss": ("validation", "loss"), "Training loss, smoothed": ("loss", "mean"),
            "Effective rank, mean of all layers": ("rank", "mean")}
    drawn = [page.chart(title, svg.lines(title, "Step", [
        line for setting in settings for line in _lines(setting, by_run, styles[setting.name], *columns)]))
        for title, columns in made.items()]
    return page.section("Curves", f'<ul class="legend">{legend}</ul>', page.charts(*drawn)) if any(drawn) else ""


def _lines(setting: Setting, by_run: dict[str, Curves], style: Style, kind: str, column: str) -> list[svg.Line]:
    """A line a run; of several seeds that were measured at the same steps also their mean, in front."""
    tables = [getattr(by_run[one.overview.name], kind) for one in setting.runs]
    pairs = [(table["step"], curves.smooth(table) if kind == "loss" else table[column]) for table in tables
             if table["step"]]
    dots = kind == "validation" and all(len(x) < 40 for x, _ in pairs)
    is_shared = len(pairs) > 1 and all(x == pairs[0][0] for x, _ in pairs)
    lines = [svg.Line(setting.name, style, x, y, is_thin=is_shared, has_dots=dots and not is_shared) for x, y in pairs]
    if is_shared:
        means = [sum(values) / len(values) for values in zip(*(y for _, y in pairs))]
        lines.append(svg.Line(setting.name, style, pairs[0][0], means, has_dots=dots))
    return lines


def _kid(known: Sequence[Facts], settings: Sequence[Setting], styles: dict[str, Style]) -> str:
    bars = []
    for setting in settings:
        for one in setting.runs:
            event = one.distance or {}
            if event.get("kid") is not None:
                seed = f", seed {_setting(one, 'train.seed')}" if len(setting.runs) > 1 else ""
                label = f"{setting.name}{seed}"
                bars.append(svg.Bar(label, styles[setting.name], event["kid"], event.get("kid_low"),
                                    event.get("kid_high")))
    event = next((one.distance for one in known if one.distance and one.distance.get("base_kid") is not None), {})
    if bars and event:
        bars.append(svg.Bar("Base model", svg.style(7), event["base_kid"], event.get("base_kid_low"),
                            event.get("base_kid_high")))
    return page.chart("KID ×10³ with its 95 % interval", svg.intervals("KID ×10³", bars),
                      "Lower is nearer to the held-out images.")


def _fronts(rows: Sequence[Row], styles: dict[str, Style]) -> list[str]:
    made = []
    for cost, unit, factor in (("time", "Training time (minutes)", 60), ("memory", "Peak memory (GB)", 1e9)):
        quality, points = measures.pareto(rows, cost)
        if points:
            label = BY_KEY[quality].label
            title = f"{label} against {BY_KEY[cost].label.lower()}"
            dots = [svg.Dot(point.name, styles[point.name], point.x / factor, point.y, point.is_front)
                    for point in points]
            best = ", ".join(point.name for point in points if point.is_front)
            made.append(page.chart(title, svg.scatter(title, unit, label, dots),
                                   f"Filled: no other setting is better in both ({best})."))
    return made


def _samples(runs: Sequence[Run], settings: Sequence[Setting], by_run: dict[str, Curves]) -> str:
    """One run a setting (its first seed), at the last step that all of them drew."""
    folder = {run.name: run.path for run in runs}
    chosen = [(setting.name, setting.runs[0].overview.name) for setting in settings]
    steps = curves.shared_steps([by_run[name].shots for _, name in chosen])
    if not steps:
        return ""
    drawn = {name: {(shot.prompt, shot.seed): shot for shot in by_run[name].shots if shot.step == steps[-1]}
             for _, name in chosen}
    prompts = list(dict.fromkeys(prompt for _, name in chosen for prompt in drawn[name]))[:MOST_PROMPTS]
    groups = [(prompt[0], [pictures.Picture(folder[name] / drawn[name][prompt].file, f"{label}: {prompt[0]}", label)
                           for label, name in chosen if prompt in drawn[name]]) for prompt in prompts]
    shown, left_out = pictures.figures(groups)
    note = f"{left_out} more pictures were left out to keep this file small." if left_out else ""
    at = "the base model" if steps[-1] == 0 else f"step {steps[-1]}"
    return page.section(f"Samples at {at}", shown, page.paragraph(note, "small")) if shown else ""


def _differences(known: Sequence[Facts]) -> str:
    names = sorted({name for other in known[1:] for name in facts.differing(known[0].preset, other.preset)})
    rows = [[page.escape(one.overview.name), *(page.escape(page.shown_value(name, _setting(one, name)))
                                               for name in names), page.escape(_state(one))] for one in known]
    like = sorted({one.like for one in known if one.like})
    return page.table(["Run", *names, "State"], rows, "left") + page.paragraph(
        f"Nearest shipped preset: {', '.join(like)}." if like else "", "small")


def _setting(known: Facts, name: str) -> object:
    section, _, key = name.partition(".")
    return known.preset.get(section, {}).get(key)


def _state(known: Facts) -> str:
    return f"{known.overview.state}, step {known.overview.step}"


def _data(known: Sequence[Facts]) -> str:
    told = {(str(one.data.get("images", "")), str(one.data.get("held_out", "")), str(one.data.get("sha256", "")))
            for one in known if one.data}
    if len(told) > 1:
        return page.section("Data set", page.paragraph("The runs were trained on different images or captions: "
                                                       "what differs may come from there.", "small"),
                            page.table(["Hash", "Images", "Held out"],
                                       [[page.escape(sha), page.escape(images), page.escape(held)]
                                        for images, held, sha in sorted(told)]))
    return page.section("Data set", *(page.facts([("Images", images), ("Held out", held),
                                                  ("Hash of images and captions", sha)]) for images, held, sha in told))


def _count(count: int, word: str) -> str:
    return f"{number(count)} {word}{'' if count == 1 else 's'}"
