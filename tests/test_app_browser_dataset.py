"""The tab "Data set" in a real browser: adding, finding, editing and arranging images, by mouse and by keyboard."""

import re
import zipfile

import pytest
from playwright.sync_api import expect

from tests.app_browser import button, chromium, late, opened, served  # noqa: F401 - a fixture
from tests.app_pictures import caption, card, images, make, texts, undo, use
from tests.data_sets import draw

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One app for all tests of this file; each has a data set of its own."""
    with served(tmp_path_factory.mktemp("app") / "w") as running:
        yield running


@pytest.fixture
def folder(server, request):
    return server.workspace / "datasets" / request.node.name[:60]


def test_images_captions_and_a_zip_are_added_to_a_new_data_set(browser, tmp_path):
    pictures = make(tmp_path / "new", 3, {"00": "first one\nsecond line"})
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as packed:
        for number in (7, 8):
            draw(tmp_path / f"{number}.png", seed=number)
            packed.write(tmp_path / f"{number}.png", f"inner/{number}.png")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    with served(tmp_path / "w") as server, opened(browser, server.address) as page:
        page.get_by_role("tab", name="Data set").click()
        button(page, "New data set").click()
        page.get_by_label("Name", exact=True).fill("cats")
        button(page, "Create").click()
        expect(page.get_by_text("No images yet")).to_be_visible()
        files = [*pictures.iterdir(), tmp_path / "more.zip", tmp_path / "notes.pdf"]
        page.locator(".st-top input[type=file]").first.set_input_files(files)
        expect(page.get_by_text("Added 5 images and 3 captions.")).to_be_visible()
        page.get_by_text("1 file left out").click()
        expect(page.get_by_text("notes.pdf: is no image")).to_be_visible()
        expect(caption(page, "00.png")).to_have_value("first one\nsecond line")
        stored = server.workspace / "datasets/cats"
        assert images(pictures).items() <= images(stored).items()
        assert not list((server.workspace / "cache/gradio").rglob("*.png"))
        undo(page).click()
        expect(page.get_by_text("No images yet")).to_be_visible()


def test_a_folder_below_a_root_is_used_in_place_or_copied(browser, tmp_path):
    folder = make(tmp_path / "w/root/photos/cats", 3, {"00": "in place"})
    with served(tmp_path / "w") as server, opened(browser, server.address) as page:
        page.get_by_role("tab", name="Data set").click()
        button(page, "Open a folder…").last.click()
        button(page, "photos").click()
        button(page, "cats (3 images)").click()
        button(page, "Use it in place").click()
        expect(page.get_by_role("dialog")).to_have_count(0)
        expect(page.get_by_text("3 images", exact=True)).to_be_visible()
        caption(page, "00.png").fill("changed where it is")
        caption(page, "01.png").focus()
        expect(undo(page)).to_contain_text("00.png")
        assert texts(folder)["00.txt"] == b"changed where it is"
        button(page, "Open a folder…").first.click()
        button(page, "photos").click()
        with late(page, "browse_folder", button(page, "cats (3 images)").click):
            button(page, "Copy it into the workspace").click()  # of what was chosen, though it is still on its way
        expect(page.get_by_role("dialog")).to_have_count(0)
        expect(page.locator(".st-set-facts")).to_contain_text("/datasets/cats")
        expect(caption(page, "00.png")).to_have_value("changed where it is")
        copy = server.workspace / "datasets/cats"
        assert images(copy) == images(folder)
        caption(page, "00.png").fill("of the copy")
        caption(page, "01.png").focus()
        expect(undo(page)).to_contain_text("00.png")
        assert texts(copy)["00.txt"] == b"of the copy" and texts(folder)["00.txt"] == b"changed where it is"


def test_a_caption_is_saved_on_leaving_it_and_only_when_it_changed(browser, server, folder):
    make(folder, 3, {"00": "plain", "01": "windows\r\nlines "})
    stamp = (folder / "02.txt").stat().st_mtime_ns
    with opened(browser, server.address) as page:
        use(page, folder, 3)
        caption(page, "00.png").fill("one\ntwo, ünïcode")
        caption(page, "01.png").fill("other\nlines ")
        caption(page, "02.png").focus()
        expect(undo(page)).to_have_text("Undo: edit the caption of 01.png")
        page.keyboard.press("Escape")
        page.wait_for_timeout(200)
    assert (folder / "00.txt").read_bytes() == "one\ntwo, ünïcode".encode()
    assert (folder / "01.txt").read_bytes() == b"other\r\nlines "
    assert (folder / "02.txt").stat().st_mtime_ns == stamp


def test_the_keyboard_walks_from_caption_to_caption_and_over_pictures(browser, server, folder):
    make(folder, 40)
    with opened(browser, server.address) as page:
        use(page, folder, 40)
        caption(page, "00.png").focus()
        for number in range(12):  # further than the first screen
            page.keyboard.press("Control+a")
            page.keyboard.type(f"caption {number}")
            page.keyboard.press("Control+Enter")
            expect(caption(page, f"{number + 1:02d}.png")).to_be_focused()
        page.keyboard.press("Alt+ArrowUp")
        expect(caption(page, "11.png")).to_be_focused()
        expect(caption(page, "11.png")).to_have_value("caption 11")
        page.keyboard.press("Escape")
        expect(card(page, "11.png")).to_be_focused()
        page.keyboard.press("Home")
        expect(card(page, "00.png")).to_be_focused()
        page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("Shift+ArrowRight")
        expect(page.get_by_text("40 images, 3 chosen")).to_be_visible()
        page.keyboard.press("x")
        expect(page.get_by_text("excluded", exact=True)).to_have_count(3)
        assert (folder / ".excluded").read_text().split() == ["00.png", "01.png", "02.png"]
        page.keyboard.press("Control+z")
        expect(page.get_by_text("excluded", exact=True)).to_have_count(0)
        page.keyboard.press("Control+a")
        expect(page.get_by_text("40 images, 40 chosen")).to_be_visible()
        page.keyboard.press("Escape")
        page.keyboard.press("End")
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog", name="Image")).to_contain_text("39.png")
    assert {f"{number:02d}.txt": f"caption {number}".encode() for number in range(12)}.items() <= texts(folder).items()


def test_search_filters_and_a_caption_that_no_longer_matches_stays_until_one_is_done(browser, server, folder):
    make(folder, 6, {"00": "a red hat", "01": "", "02": "", "03": "A RED tree"})
    with opened(browser, server.address) as page:
        use(page, folder, 6)
        page.get_by_label("Search in captions").fill("red a")
        expect(page.get_by_text("2 of 6 images")).to_be_visible()
        page.get_by_label("Search in captions").fill("")
        page.get_by_label("Show", exact=True).select_option("no_caption")
        expect(page.get_by_text("2 of 6 images")).to_be_visible()
        caption(page, "01.png").fill("now it has one")
        caption(page, "01.png").press("Control+Enter")
        expect(caption(page, "02.png")).to_be_focused()
        page.wait_for_timeout(2500)  # the page has looked again
        expect(caption(page, "01.png")).to_have_value("now it has one")
        page.get_by_label("Show", exact=True).select_option("all")
        page.get_by_label("Show", exact=True).select_option("no_caption")
        expect(page.get_by_text("1 of 6 images")).to_be_visible()


def test_images_are_deleted_restored_and_moved(browser, server, folder):
    make(folder, 4)
    other = make(folder.parent / "zz other", 1)
    before = images(folder)
    with opened(browser, server.address) as page:
        use(page, folder, 4)
        card(page, "01.png").click()
        card(page, "02.png").click(modifiers=["Control"])
        button(page, "Delete").click()
        expect(page.get_by_text("2 images", exact=True)).to_be_visible()
        assert not (folder / "01.png").exists() and not (folder / "01.txt").exists()
        button(page, "Trash…").click()
        page.get_by_role("dialog").get_by_label("All").check()
        button(page, "Restore").click()
        expect(page.get_by_text("4 images", exact=True)).to_be_visible()
        assert images(folder) == before
        card(page, "03.png").click()
        button(page, "Move or copy…").click()
        page.get_by_label("Where to").select_option(label="Data set zz other")
        page.get_by_label("Keep them here").uncheck()
        button(page, "Go").click()
        expect(page.get_by_text("3 images", exact=True)).to_be_visible()
    assert set(images(other)) == {"00.png", "03.png"} and images(other)["03.png"] == before["03.png"]


def test_tags_are_completed_moved_and_taken_out(browser, server, folder):
    make(folder, 3, {"00": "alpha, beta, gamma", "01": "beta, delta", "02": "no tags here"})
    with opened(browser, server.address) as page:
        use(page, folder, 3)
        page.get_by_label("View", exact=True).select_option("tags")
        entry = page.get_by_role("combobox", name="Add a tag to 00.png")
        entry.press_sequentially("del")
        expect(page.get_by_role("option", name="delta 1")).to_be_visible()
        entry.press("ArrowDown")
        entry.press("Enter")
        page.get_by_role("button", name="alpha, tag 1 of 4").press("Alt+ArrowRight")
        expect(page.get_by_role("button", name="alpha, tag 2 of 4")).to_be_focused()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Delete")
        gamma = page.get_by_role("button", name="gamma, tag 2 of 3")
        gamma.drag_to(page.get_by_role("button", name="alpha, tag 1 of 3"), target_position={"x": 2, "y": 8})
        expect(page.get_by_role("button", name="gamma, tag 1 of 3")).to_be_visible()
        page.wait_for_timeout(300)
    assert (folder / "00.txt").read_bytes() == b"gamma, alpha, delta"
    assert (folder / "02.txt").read_bytes() == b"no tags here"


def test_a_tag_that_is_written_otherwise_takes_the_place_of_the_old_one(browser, server, folder):
    make(folder, 2, {"00": "alpha, beta, gamma", "01": "one"})
    with opened(browser, server.address) as page:
        use(page, folder, 2)
        page.get_by_label("View", exact=True).select_option("tags")
        page.wait_for_timeout(600)  # tokens are counted, which updates the cards
        entry = page.get_by_role("combobox", name="Add a tag to 00.png")
        page.get_by_role("button", name="beta, tag 2 of 3").click()
        expect(entry).to_have_value("beta")
        (folder / "01.txt").write_text("two")  # makes the page read all cards again
        expect(page.get_by_role("button", name="two, tag 1 of 1")).to_be_visible()
        entry.fill("delta")
        entry.press("Enter")
        expect(page.get_by_role("button", name="delta, tag 2 of 3")).to_be_visible()
        expect(undo(page)).to_contain_text("00.png")
        assert (folder / "00.txt").read_text() == "alpha, delta, gamma"
        page.get_by_role("button", name="gamma, tag 3 of 3").click()
        (folder / "00.txt").write_text("first, gamma, alpha")  # by another program
        (folder / "01.txt").write_text("three")
        expect(page.get_by_role("button", name="three, tag 1 of 1")).to_be_visible()
        entry.fill("omega")
        entry.press("Enter")
        expect(page.get_by_role("button", name="omega, tag 2 of 3")).to_be_visible()
        page.get_by_role("button", name="alpha, tag 3 of 3").click()
        entry.press("Escape")
        expect(page.get_by_role("button", name="alpha, tag 3 of 3")).to_be_visible()
        page.wait_for_timeout(300)
    assert (folder / "00.txt").read_text() == "first, omega, alpha"


def test_tokens_are_counted_and_the_limit_is_marked_where_it_falls(browser, server, folder):
    make(folder, 2, {"00": "cat " * 80 + "tail", "01": "short"})
    with opened(browser, server.address) as page:
        use(page, folder, 2)
        tile = page.locator(".st-tile", has_text="00.png")
        expect(tile.locator(".st-tile-foot")).to_contain_text("83 tokens, 6 beyond 77 · 324 characters")
        expect(tile.locator("mark")).to_have_text(re.compile(r"^(cat ){5}tail$"))
        expect(page.locator(".st-tile", has_text="01.png").locator("mark")).to_have_count(0)


def test_two_tabs_do_not_lose_an_edit(browser, server, folder):
    make(folder, 2, {"00": "as it was"})
    with opened(browser, server.address) as one, opened(browser, server.address) as two:
        use(one, folder, 2)
        use(two, folder, 2)
        caption(two, "00.png").fill("typed in the second tab")
        caption(one, "00.png").fill("saved by the first tab")
        caption(one, "00.png").press("Control+Enter")
        expect(undo(one)).to_contain_text("00.png")
        caption(two, "00.png").press("Control+Enter")
        dialog = two.get_by_role("dialog", name="00.png was changed elsewhere")
        expect(dialog.get_by_label("Yours")).to_have_value("typed in the second tab")
        expect(dialog.get_by_label("As it is saved now")).to_have_value("saved by the first tab")
        assert (folder / "00.txt").read_text() == "saved by the first tab"
        button(two, "Decide later").click()
        expect(caption(two, "00.png")).to_have_value("typed in the second tab")
        expect(two.locator(".st-tile", has_text="00.png")).to_contain_text("tokens")  # all that a card may say
        button(two, "Compare").click()
        two.get_by_label("Yours").fill("both: first and second")
        button(two, "Save yours").click()
        expect(caption(one, "00.png")).to_have_value("both: first and second")
        undo(one).click()
        expect(caption(two, "00.png")).to_have_value("saved by the first tab")


def test_undo_takes_nothing_of_another_window_back_and_keys_undo_one_after_the_other(browser, server, folder):
    make(folder, 3, {"00": "first", "01": "second"})
    before = texts(folder)
    with opened(browser, server.address) as one, opened(browser, server.address) as two:
        use(one, folder, 3)
        caption(one, "00.png").fill("by one")
        caption(one, "00.png").press("Control+Enter")
        expect(undo(one)).to_contain_text("00.png")
        use(two, folder, 3)
        with late(one, "read_info"):
            caption(two, "01.png").fill("by two")
            caption(two, "01.png").press("Control+Enter")
            expect(undo(two)).to_contain_text("01.png")
            undo(one).click()
            expect(one.get_by_text("Nothing was undone: another window has changed this data set")).to_be_visible()
        assert texts(folder)["01.txt"] == b"by two" and texts(folder)["00.txt"] == b"by one"
        expect(undo(one)).to_contain_text("01.png")
        card(one, "02.png").focus()
        for key in ("x", "Control+z", "Control+z", "Control+z"):  # none waits for the answer to the one before
            one.keyboard.press(key)
        expect(undo(one)).to_be_disabled()
        expect(one.get_by_text("excluded", exact=True)).to_have_count(0)
        assert texts(folder) == before
        for _ in range(2):
            one.keyboard.press("Control+y")
        expect(caption(one, "01.png")).to_have_value("by two")


def test_the_large_view_shows_what_another_tab_saved_and_overwrites_nothing(browser, server, folder):
    make(folder, 2, {"00": "as it was", "01": "second"})
    with opened(browser, server.address) as one, opened(browser, server.address) as two:
        use(one, folder, 2)
        use(two, folder, 2)
        card(one, "00.png").dblclick()
        large = one.get_by_label("Caption", exact=True)
        expect(large).to_have_value("as it was")
        caption(two, "00.png").fill("of the other tab")
        caption(two, "00.png").press("Control+Enter")
        expect(large).to_have_value("of the other tab")
        large.press("Control+End")
        large.press_sequentially(", and more")
        large.press("Control+Enter")
        expect(large).to_have_value("second")
        expect(caption(two, "00.png")).to_have_value("of the other tab, and more")
        large.fill("typed large")  # not saved yet, so that the other tab's is a conflict
        caption(two, "01.png").fill("typed beside")
        caption(two, "01.png").press("Control+Enter")
        expect(undo(two)).to_contain_text("01.png")
        one.wait_for_timeout(2500)  # the page has looked again
        expect(large).to_have_value("typed large")
        large.press("Control+Enter")
        expect(one.get_by_role("dialog", name="01.png was changed elsewhere").get_by_label("Yours")).to_have_value(
            "typed large")
        assert (folder / "01.txt").read_text() == "typed beside"
