"""The panels of the tab "Data set" in a real browser: bulk changes, overview, health, captions by a model, masks."""

import re

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests import models_caption
from tests.app_browser import button, chromium, faults, late, opened, served  # noqa: F401 - a fixture
from tests.app_pictures import caption, card, images, make, panel, texts, undo, use
from tests.data_sets import draw
from trainer.caption import task as captioner
from trainer.events import EventWriter

pytestmark = pytest.mark.browser
PRESET = ('[model]\nfamily = "sd15"\nbase = "base"\n[data]\nfolder = "."\nresolution = 256\ntrigger = "sks"\n'
          'shuffle_tags = true\n[train]\nsteps = 5\n')


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One app for all tests of this file; each has a data set of its own."""
    workspace = tmp_path_factory.mktemp("app") / "w"
    (workspace / "presets").mkdir(parents=True)
    (workspace / "presets/mine.toml").write_text(PRESET)
    with served(workspace) as running:
        yield running


@pytest.fixture
def folder(server, request):
    return server.workspace / "datasets" / re.sub(r"\W", "_", request.node.name[:60])


def test_a_bulk_change_is_shown_first_and_undone_after_a_restart(browser, tmp_path):
    folder = make(tmp_path / "w/datasets/bulk", 8, {"00": "a red cat", "01": "Red, tree", "02": "infrared\r\nred "})
    before, pixels = texts(folder), images(folder)
    with served(tmp_path / "w") as server:
        with opened(browser, server.address) as page:
            use(page, folder, 8)
            bulk = panel(page, "Bulk edit")
            bulk.get_by_label("Find").fill("red")
            bulk.get_by_label("Replace by").fill("green")
            expect(bulk.get_by_text(re.compile(r"\d of 8 captions of all 8 images would change"))).to_be_visible()
            expect(bulk.locator("li", has_text="02.png").locator("ins").first).to_have_text("infragreen")
            assert texts(folder) == before
            page.get_by_label("Search in captions").fill("infra")
            expect(bulk.get_by_text("1 of 1 caption of the 1 image shown would change in 2 places.")).to_be_visible()
            page.get_by_label("Search in captions").fill("")
            expect(button(page, re.compile(r"^Change \d captions"))).to_be_enabled()
            assert bulk.get_by_label("Find").evaluate("""input => {
                input.dispatchEvent(new Event("input"));
                return document.querySelector(".st-panel .st-primary").disabled;
            }""")  # at once: nothing is changed as it was asked for before
            card(page, "00.png").click()
            card(page, "01.png").click(modifiers=["Shift"])
            expect(bulk.get_by_text("2 of 2 captions of the 2 chosen images would change.")).to_be_visible()
            button(page, "Change 2 captions").click()
            expect(caption(page, "01.png")).to_have_value("green, tree")
            page.get_by_label("Search in captions").fill("infra")
            expect(bulk.get_by_text("1 of 1 caption")).to_be_visible()
            button(page, "Change 1 caption").click()
            expect(caption(page, "02.png")).to_have_value("infragreen\ngreen ")
            assert texts(folder)["02.txt"] == b"infragreen\r\ngreen "
        server.kill()
        server.start()
        with opened(browser, server.address) as page:
            use(page, folder, 8)
            expect(undo(page)).to_have_text('Undo: replace "red" by "green"')
            undo(page).click()
            expect(caption(page, "02.png")).to_have_value("infrared\nred ")
            page.keyboard.press("Control+z")
            expect(undo(page)).to_be_disabled()
            assert texts(folder) == before and images(folder) == pixels
            page.keyboard.press("Control+y")
            expect(caption(page, "01.png")).to_have_value("green, tree")


def test_faulty_expressions_are_told_and_each_kind_of_bulk_change_works(browser, server, folder):
    make(folder, 2, {"00": "b, a, b", "01": "c; d"})
    with opened(browser, server.address) as page:
        use(page, folder, 2)
        bulk = panel(page, "Bulk edit")
        bulk.get_by_label("As", exact=True).select_option("regex")
        bulk.get_by_label("Find").fill("(")
        expect(bulk.get_by_text("is not valid")).to_be_visible()
        steps = [("separator", {}, "Change 1 caption"), ("remove_duplicates", {}, "Change 1 caption"),
                 ("sort_tags", {}, "Change 1 caption"), ("trigger", {"Trigger word": "sks"}, "Change 2 captions"),
                 ("rename_tag", {"Tag": "a", "New name": "x"}, "Change 1 caption"),
                 ("remove_tags", {"Tags": "b"}, "Change 1 caption"), ("add", {"Add": "new"}, "Change 2 captions")]
        for kind, fields, label in steps:
            bulk.get_by_label("What to do").select_option(kind)
            for name, value in fields.items():
                bulk.get_by_label(name, exact=True).fill(value)
            button(page, label).click()
            expect(page.get_by_text(f"Changed {label.removeprefix('Change ')}")).to_be_visible()
            page.locator(".st-data .st-asked").evaluate("element => { element.textContent = ''; }")
    assert texts(folder) == {"00.txt": b"new, sks, x", "01.txt": b"new, sks, c, d"}


def test_the_overview_counts_filters_and_shows_crops(browser, server, folder):
    make(folder, 4, {"00": "sks, cat", "01": "cat, dog"})
    draw(folder / "wide.png", (600, 200), 9, "sks, wide")
    with opened(browser, server.address) as page:
        use(page, folder, 5)
        overview = panel(page, "Overview")
        expect(overview.get_by_label("Resolution")).to_have_value("256")
        expect(overview.get_by_label("Trigger word")).to_have_value("sks")
        expect(overview.get_by_text("4 of 5 captions have the trigger word “sks”;")).to_be_visible()
        expect(overview.get_by_role("row", name=re.compile("^wide 1"))).to_be_visible()
        expect(overview.get_by_text(re.compile(r"An epoch shows 5 images in 5 steps"))).to_be_visible()
        bucket = overview.get_by_role("row", name=re.compile(r"^4\d\d × 1\d\d 1, cut"))
        card(page, "wide.png").hover()
        expect(page.locator(".st-crop:visible")).to_have_count(1)
        bucket.get_by_role("button").click()
        expect(page.get_by_text("1 of 5 images")).to_be_visible()
        page.get_by_role("button", name="Show no longer only: Bucket").click()
        overview.get_by_role("button", name="dog", exact=True).click()
        expect(page.locator(".st-chosen")).to_contain_text("of 5 images")
        expect(caption(page, "01.png")).to_be_visible()
        expect(caption(page, "wide.png")).to_have_count(0)
        expect(overview.get_by_role("img", name=re.compile("half of them lie below 500"))).to_be_visible()


def test_captions_are_shown_as_training_will_see_them(browser, server, folder):
    make(folder, 7)
    other = PRESET.replace('folder = "."', f"folder = '../datasets/{folder.name}'").replace("sks", "a trigger")
    (server.workspace / "presets/other.toml").write_text(other)
    with opened(browser, server.address) as page:
        use(page, folder, 7)
        seen = panel(page, "As trained")
        expect(seen.get_by_role("listitem")).to_have_count(5)
        expect(seen.get_by_label("As in the preset")).to_have_value("own/other")  # the one that uses this data set
        expect(seen.get_by_role("listitem").first).to_contain_text("a trigger, ")
        expect(seen.get_by_text("Tags are shuffled, the first 1 stay.")).to_be_visible()
        first = seen.get_by_role("list").text_content()
        button(page, "Five others").click()
        expect(seen.get_by_role("list")).not_to_have_text(first)


def test_a_health_finding_is_shown_mended_and_undone(browser, server, folder):
    make(folder, 4, {"00": "no trigger"})
    (folder / "01.txt").write_bytes("M\xe4dchen, sks".encode("latin-1"))
    (folder / "lone.txt").write_bytes(b"nobody")
    (folder / "copy.png").write_bytes((folder / "03.png").read_bytes())
    before, pixels = texts(folder), images(folder)
    with opened(browser, server.address) as page:
        use(page, folder, 5)
        health = panel(page, "Health check")
        expect(health.get_by_text("Captions that are not UTF-8: 1")).to_be_visible()
        expect(page.get_by_text("is not UTF-8 text")).to_be_visible()
        expect(health.get_by_text("The same image more than once: 2")).to_be_visible()
        button(page, "Show: The same image more than once").click()
        expect(page.get_by_text("2 of 5 images")).to_be_visible()
        page.get_by_role("button", name="Show no longer only").click()
        button(page, "Convert the captions to UTF-8: Captions that are not UTF-8").click()
        expect(caption(page, "01.png")).to_have_value("Mädchen, sks")
        button(page, "Exclude all but one of each: The same image more than once").click()
        expect(page.get_by_text("excluded", exact=True)).to_have_count(1)
        button(page, "Add the trigger word: Captions without the trigger word").click()
        expect(caption(page, "00.png")).to_have_value("sks, no trigger")
        button(page, "Move them to the trash: Captions without an image").click()
        expect(health.get_by_text("Captions without an image")).to_have_count(0)
        for _ in range(4):
            what = undo(page).text_content()
            undo(page).click()
            expect(undo(page)).not_to_have_text(what)
    assert texts(folder) == before and images(folder) == pixels and not (folder / ".excluded").exists()


def test_a_model_proposes_captions_which_are_written_when_applied(browser, server, folder, tmp_path):
    make(folder, 4, {"00": "", "01": "", "02": "", "03": "by hand"})
    with opened(browser, server.address) as page:
        use(page, folder, 4)
        automatic = panel(page, "Automatic captions")
        automatic.get_by_label("Model").select_option("other")
        button(page, "Start").click()
        expect(automatic.get_by_text("Give the model: a hub id or a folder.")).to_be_visible()
        automatic.get_by_label("Hub id or folder").fill(str(models_caption.tagger(tmp_path / "tagger")))
        automatic.get_by_text("For taggers").click()
        automatic.get_by_label("Threshold", exact=True).fill("3")
        button(page, "Start").click()
        expect(automatic.get_by_text("should be less than or equal to 1, not 3")).to_be_visible()
        automatic.get_by_label("Threshold", exact=True).fill("0.35")
        automatic.get_by_label("Prefix").fill("sks, ")
        button(page, "Start").click()
        row = automatic.get_by_role("row", name="02.png")
        expect(row).to_contain_text("red circle", timeout=60_000)
        button(page, "Apply 3 captions").wait_for()
        assert (folder / "00.txt").read_text() == ""
        page.reload()  # the task is found again
        use(page, folder, 4)
        automatic = panel(page, "Automatic captions")
        automatic.get_by_label("Apply to 01.png").uncheck()
        button(page, "Apply 2 captions").click()
        expect(caption(page, "02.png")).to_have_value(re.compile("^sks, .*red circle"))
        expect(undo(page)).to_have_text("Undo: Automatic captions")
        expect(button(page, "Start")).to_be_visible()
        assert texts(folder)["01.txt"] == b"" and texts(folder)["03.txt"] == b"by hand"


def test_proposals_of_one_data_set_never_come_up_in_another(browser, server, folder):
    other = make(folder.with_name("without_proposals"), 2)
    make(folder, 3)
    task = captioner.create(server.workspace, captioner.parse({"folder": str(folder), "model": "m/n"}))
    EventWriter(task.results).write("caption", image="00.png", before="", after="of the first set")
    EventWriter(task.events).write("end", reason="done", done=1, of=1)
    with opened(browser, server.address) as page:
        use(page, folder, 3)
        page.evaluate("""() => {
            const { ask, CaptioningPanel } = Studio;
            const { opened } = CaptioningPanel.prototype;
            Object.assign(window, { answers: [], openings: 0 });
            CaptioningPanel.prototype.opened = function () { opened.call(this); window.openings += 1; };
            Studio.ask = async (server, name, request) => {
                const answer = await ask(server, name, request);
                if (name === "read_captioning" && answer.task) await new Promise((go) => { window.arrive = go; });
                if (name === "read_captioning") window.answers.push(answer.task);
                return answer;
            };
        }""")
        automatic = panel(page, "Automatic captions")
        page.wait_for_function("window.arrive !== undefined")
        page.get_by_role("combobox", name="Data set").select_option(label=other.name)
        page.wait_for_function("window.openings === 2")
        page.evaluate("window.arrive()")
        page.wait_for_function("window.answers.length === 2")
        expect(button(page, "Start")).to_be_visible()
        expect(automatic.get_by_text("of the first set")).to_have_count(0)
        page.evaluate("delete window.arrive")
        page.get_by_role("combobox", name="Data set").select_option(label=folder.name)
        page.wait_for_function("window.arrive !== undefined")
        page.evaluate("window.arrive()")
        expect(automatic.get_by_text("of the first set")).to_be_visible()


def test_proposals_are_written_where_they_were_made_while_another_data_set_opens(browser, server, folder):
    other = make(folder.with_name("opens_meanwhile"), 2)
    make(folder, 2)
    before, old = texts(other), texts(folder)["00.txt"].decode()
    task = captioner.create(server.workspace, captioner.parse({"folder": str(folder), "model": "m/n"}))
    EventWriter(task.results).write("caption", image="00.png", before=old, after="proposed")
    EventWriter(task.events).write("end", reason="done", done=1, of=1)
    with opened(browser, server.address) as page:
        use(page, folder, 2)
        panel(page, "Automatic captions")
        expect(button(page, "Apply 1 caption")).to_be_enabled()
        with late(page, "list_sets", lambda: page.locator("#studio-dataset").select_option(label=other.name)):
            button(page, "Apply 1 caption").click()
            expect(page.get_by_text("Wrote 1 caption.")).to_be_visible()
        expect(button(page, "Start")).to_be_visible()
    assert texts(folder)["00.txt"] == b"proposed" and texts(other) == before


def test_what_is_shown_of_one_data_set_is_done_there_while_another_one_opens(browser, server, folder):
    other = make(folder.with_name("with_the_same_names"), 3)
    make(folder, 3)
    (folder / "lone.txt").write_text("lone")
    (other / "lone.txt").write_text("lone")
    before = texts(other) | images(other)

    def choose(name):
        page.locator("#studio-dataset").evaluate("""(choice, name) => {
            choice.value = [...choice.options].find((option) => option.text === name).value;
            choice.dispatchEvent(new Event("change"));
        }""", name)

    with opened(browser, server.address) as page:
        use(page, folder, 3)
        panel(page, "Health check")
        mend = button(page, "Move them to the trash: Captions without an image")
        expect(mend).to_be_visible()
        with late(page, "list_sets", lambda: choose(other.name)):
            mend.click()
            expect(page.get_by_text("Done:")).to_be_visible()
        for opener, goal in (("Move or copy…", "Go"), ("Trash…", "Restore")):
            choose(folder.name)
            expect(page.locator(".st-set-facts")).to_contain_text(folder.name)
            if goal == "Go":
                card(page, "02.png").click()
            button(page, opener).click()
            if goal == "Go":
                page.get_by_label("Where to").select_option("folder")
                page.get_by_label("Folder", exact=True).fill("moved")
            else:
                page.get_by_label("All", exact=True).check()
            choose(other.name)
            expect(page.locator(".st-set-facts")).to_contain_text(other.name)
            button(page, goal).click()
            expect(page.get_by_role("dialog")).to_have_count(0)
    assert texts(other) | images(other) == before
    assert set(texts(folder)) == {"00.txt", "01.txt", "moved/02.txt", "lone.txt"}


def test_captions_are_not_made_for_all_when_none_is_shown_and_excluded_ones_are_not_counted(browser, server, folder):
    make(folder, 3)
    with opened(browser, server.address) as page:
        use(page, folder, 3)
        automatic = panel(page, "Automatic captions")
        expect(automatic.get_by_text("For all 3 images, as the mode says.")).to_be_visible()
        card(page, "00.png").focus()
        page.keyboard.press("x")
        expect(automatic.get_by_text("For all 2 images that are not excluded, as the mode says.")).to_be_visible()
        page.get_by_label("Search in captions").fill("no caption says this")
        expect(page.get_by_text("No image matches.")).to_be_visible()
        automatic.get_by_label("Model").select_option("other")
        automatic.get_by_label("Hub id or folder").fill("any/model")
        button(page, "Start").click()
        expect(automatic.get_by_text("No image is shown: change the search or the filter")).to_be_visible()
        expect(automatic.get_by_role("region", name="Proposed captions")).to_be_hidden()


def test_a_mask_is_drawn_by_mouse_and_by_keyboard(browser, server, folder):
    make(folder, 2)
    pixels = images(folder)
    mask = folder / "00-masklabel.png"
    with opened(browser, server.address) as page:
        use(page, folder, 2)
        card(page, "00.png").dblclick()
        button(page, "Draw a mask").click()
        brush = page.get_by_role("application")
        expect(brush).to_be_focused()
        page.wait_for_function("document.querySelector('.st-stage img').complete")  # then it lies where it stays
        page.wait_for_function("document.querySelector('.st-brush').offsetWidth > 100")
        box = brush.bounding_box()
        page.mouse.move(box["x"] + 5, box["y"] + box["height"] / 4)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 5, box["y"] + box["height"] / 4, steps=5)
        page.mouse.up()
        button(page, "Save the mask").click()
        expect(button(page, "Change the mask")).to_be_visible()
        drawn = Image.open(mask).convert("L")
        assert drawn.size == (96, 64) and drawn.getpixel((48, 16)) == 0 and drawn.getpixel((48, 48)) == 255
        button(page, "Change the mask").click()
        expect(brush).to_be_focused()
        for key in ("e", "Space", *["ArrowDown"] * 3, "e", "Space"):
            page.keyboard.press(key)
        button(page, "Swap in and out").click()
        button(page, "Undo stroke").click()
        assert faults(page) == []
        button(page, "Close").last.click()  # what was drawn is kept
        expect(brush).to_be_hidden()
        expect(undo(page)).to_have_text("Undo: draw the mask of 00.png")
        expect(page.get_by_text("mask", exact=True)).to_have_count(1)
        again = Image.open(mask).convert("L")
        assert again.getpixel((48, 16)) == 0 and again.tobytes() != drawn.tobytes()
        undo(page).click()
        expect(page.get_by_text("Undone: draw the mask of 00.png.")).to_be_visible()
        assert Image.open(mask).convert("L").tobytes() == drawn.tobytes()
        undo(page).click()
        expect(page.get_by_text("mask", exact=True)).to_have_count(0)
    assert not mask.exists() and images(folder) == pixels


def test_a_mask_that_another_tab_changed_is_not_overwritten_unasked(browser, server, folder):
    make(folder, 1)
    mask = folder / "00-masklabel.png"
    with opened(browser, server.address) as one, opened(browser, server.address) as two:
        for page in (one, two):
            use(page, folder, 1)
            card(page, "00.png").dblclick()
            button(page, "Draw a mask").click()
            expect(page.get_by_role("application")).to_be_focused()
            page.keyboard.press("Space")
        two.keyboard.press("Shift+ArrowLeft")
        button(one, "Save the mask").click()
        expect(button(one, "Change the mask")).to_be_visible()
        first = mask.read_bytes()
        button(two, "Save the mask").click()
        expect(two.get_by_text("Another tab or program changed this mask")).to_be_visible()
        assert mask.read_bytes() == first
        button(two, "Save the mask").click()
        expect(button(two, "Change the mask")).to_be_visible()
        assert mask.read_bytes() != first


def test_a_preset_takes_its_folder_from_the_data_sets(browser, server, folder):
    make(folder, 1)
    with opened(browser, server.address) as page:
        page.get_by_role("tab", name="Preset").click()
        choice = page.get_by_label("Choose a data set for Images")
        choice.focus()
        expect(choice.get_by_role("option", name=folder.name)).to_be_attached()
        choice.select_option(label=folder.name)
        expect(page.get_by_label("Preset as TOML text")).to_have_value(re.compile(re.escape(folder.as_posix())))
