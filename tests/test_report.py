"""Reports and run cards: whole, self-contained, small, and with nothing private or dangerous in them."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.run_folders import finished
from trainer.events import EventWriter
from trainer.report import card, comparison, page, pictures, svg

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
VOID = {"meta", "img", "br", "i"}
STYLE = Path(__file__).parent.parent / "app/assets/style.css"


class Reader(HTMLParser):
    """Tags in their order, checked to be closed, and every attribute."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def whole(html):
    """A page that is well made, loads nothing, and runs nothing."""
    read = Reader(html)
    assert read.open == [] and read.seen[0] == "html"
    assert "script" not in read.seen and "link" not in read.seen and "iframe" not in read.seen
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert all(value.startswith("data:image/webp;base64,") for name, value in read.attributes if name == "src")
    assert not [name for name, _ in read.attributes if name in ("href", "srcset", "action")]
    assert not re.search(r"https?://|url\(|@import", html)
    return read


def trained(workspace, name, *overrides, loss=0.2, kid=20.0, prompts=("a cat", "a dog"), size=600):
    run = finished(workspace, name, *overrides, validation=loss, kid=(kid, kid - 5, kid + 5), base_kid=90.0)
    run.samples.mkdir()
    events = EventWriter(run.events)
    for step in (0, 100):
        names = [f"samples/{step:06d}_{index:02d}.png" for index in range(len(prompts))]
        for index, picture in enumerate(names):
            Image.effect_noise((size, size), 90 + index).save(run.path / picture)
        events.write("sample", step=step, images=names, prompts=list(prompts), seed=1)
    events.write("data", images=24, held_out=12, sha256="0123456789abcdef")
    events.write("end", step=100, reason="done", trained_sec=60.0)
    events.close()
    return run


def test_a_report_says_what_counts_and_shows_all_of_it(tmp_path):
    runs = [trained(tmp_path, f"{name}-{seed}", f"adapter.method={name}", f"train.seed={seed}", loss=loss + seed * 0.1,
                    kid=100 * loss) for seed in (0, 1, 2) for name, loss in (("lora", 0.3), ("stella", 0.2))]
    html = comparison.make(runs, "My comparison")
    text = " ".join(whole(html).text)
    for part in ("My comparison", "6 runs of 2 settings", "stella is below lora by 0.1", "3 paired seeds",
                 "significant", "higher than stella", "lowest", "Effective rank, mean of all layers",
                 "Samples at step 100", "KID ×10³ against time", "0123456789abcdef", "train.seed",
                 "Hardware and versions", "2.13.0"):
        assert part in text, part
    assert html.count('class="chart"') == 6 and html.count("<img") == 2 * 2
    assert len(html) < 1_000_000


def test_a_card_tells_all_of_one_run(tmp_path):
    html = card.make(trained(tmp_path, "mine", "adapter.rank=5"))
    text = " ".join(whole(html).text)
    for part in ("mine", "sd15 · stella, rank 5 · done, step 100", "20 (15 to 25)", "worst relative error 0.00034",
                 "adapter.rank", "0123456789abcdef", "Base model", "rank = 5", "FD 158.1, floor 143.2"):
        assert part in text, part
    assert html.count("<img") == 4


def test_nothing_of_this_computer_is_told(tmp_path):
    run = trained(tmp_path, "a", f"data.folder={tmp_path}/secret-place/cats",
                  "model.base='C:\\Users\\ada\\base.safetensors'")
    events = EventWriter(run.events)
    broken = f"{tmp_path}/secret-place/broken.png"
    events.write("skipped", file=broken, reason=f"{broken}: not an image")
    events.write("export", step=100, path=run.result.name, format="U1", worst_rel_error=1e-3, unmatched=[],
                 readers=["ComfyUI"], others=[f"see {tmp_path}/secret-place/x.txt"])
    for html in (card.make(run), comparison.make([run, trained(tmp_path, "b")])):
        for secret in (str(tmp_path), "secret-place", "Users"):
            assert secret not in html, secret
        assert not re.search(r"\bbox\b", html.split("</style>")[1])  # the host
        assert "cats" in html or "base.safetensors" in html


def test_hostile_names_and_captions_stay_text(tmp_path):
    prompts = (HOSTILE, "</style></title>&amp;")
    runs = [trained(tmp_path, name, f"data.trigger='{HOSTILE}'", f"adapter.rank={rank}", prompts=prompts, size=64)
            for name, rank in (("a", 4), ("b", 8))]
    events = EventWriter(runs[0].events)
    events.write("start", step=100, steps=100, device=HOSTILE, torch=HOSTILE, versions={HOSTILE: HOSTILE})
    events.write("skipped", file=HOSTILE, reason=HOSTILE)
    events.write("data", images=HOSTILE, held_out=HOSTILE, sha256=HOSTILE)
    for html in (comparison.make(runs, HOSTILE), card.make(runs[0])):
        assert HOSTILE in "".join(whole(html).text)


def test_runs_that_measured_nothing_make_a_page_too(tmp_path):
    run = finished(tmp_path, "a")
    run.events.unlink()
    for html in (card.make(run), comparison.make([run])):
        whole(html)
        assert "None" not in html and "nan" not in re.sub(r"<style>.*</style>", "", html, flags=re.DOTALL)


def test_pictures_shrink_and_then_stay_away_to_keep_the_file_small(tmp_path):
    Image.effect_noise((800, 600), 120).save(tmp_path / "a.png")
    group = [pictures.Picture(tmp_path / "a.png", "alt", "caption")] * 4
    large, _ = pictures.figures([("one", group)])
    small, left_out = pictures.figures([("one", group), ("two", group)], most=len(large) // 3)
    assert 0 < len(small) < len(large) // 3 + 2000 and left_out in (0, 4)
    assert pictures.figures([("one", group), ("two", group)], most=10) == ("", 8)
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert pictures.figures([("one", [pictures.Picture(tmp_path / "b.png", "", "")])]) == ("", 0)


def test_the_colours_are_the_apps():
    def colours(text):
        return dict(re.findall(r"(--st-[a-z0-9-]+): (#[0-9a-f]{6})", text))

    ours, theirs = page.STYLE.read_text(), STYLE.read_text()
    for before, dark in ((ours.split("@media")[0], theirs.split("body.dark")[0]),
                         (ours.split("prefers-color-scheme: dark")[1], theirs.split("body.dark")[1])):
        assert colours(before) and colours(before).items() <= colours(dark).items()


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 10, [0, 2, 4, 6, 8, 10]), (0.011, 0.029, [0.015, 0.02, 0.025]), (-1, 1, [-1, -0.5, 0, 0.5, 1])])
def test_ticks_are_round(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_neighbouring_settings_differ_in_colour_and_in_dash():
    styles = [svg.style(index) for index in range(8)]
    assert len({style.colour for style in styles}) == 8
    assert all(one.dash != other.dash for one, other in zip(styles, styles[1:]))


@pytest.mark.parametrize(("text", "expected"), [
    ("/home/ada/x.png: bad", "x.png: bad"), ("see C:\\Users\\ada\\x.txt", "see x.txt"),
    ("s/it and 1/2", "s/it and 1/2"),
    ("file:///srv/data/a.safetensors", "a.safetensors"), ("owner/model", "owner/model"), ("~/models/b", "b")])
def test_whole_paths_are_cut_to_their_last_part(text, expected):
    assert page.without_folders(text) == expected


def test_the_shell_writes_both_and_says_where(tmp_path, trainer):
    for name, rank in (("a", 4), ("b", 8)):
        trained(tmp_path, name, f"adapter.rank={rank}")
    said = trainer("compare", "a", "b", "--html", tmp_path / "r.html", "--workspace", tmp_path)
    assert said.code == 0 and said.out.startswith(f"{tmp_path / 'r.html'}: "), said.err
    assert trainer("show", "a", "--html", tmp_path / "c.html", "--workspace", tmp_path).code == 0
    whole((tmp_path / "r.html").read_text())
    whole((tmp_path / "c.html").read_text())
    refused = trainer("show", "a", "--html", tmp_path / "r.html/c.html", "--workspace", tmp_path)
    assert refused.code == 1 and "r.html/c.html: cannot be written" in refused.err
