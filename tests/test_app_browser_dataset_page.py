"""The tab "Data set" as a page: contrast and names, widths from a phone to a wall, what is in it, and what it costs."""

import re

import pytest
from playwright.sync_api import expect

from tests.app_browser import button, chromium, faults, late, opened, served  # noqa: F401 - a fixture
from tests.app_pictures import caption, card, make, panel, undo, use
from tests.data_sets import draw

pytestmark = pytest.mark.browser
PANELS = ("Bulk edit", "Overview", "Health check", "Automatic captions", "As trained")
MANY = 400


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A data set with something of everything, one of many images, an empty one, and a folder elsewhere."""
    workspace = tmp_path_factory.mktemp("app") / "w"
    odd = make(workspace / "datasets/odd", 4, {"00": "cat " * 90, "01": "", "02": "a, b"})
    (odd / "03.txt").write_bytes(b"\xff\xfe\xfa")
    (odd / "broken.png").write_bytes(b"no picture")
    (odd / "3_more").mkdir()
    draw(odd / "3_more/x.png", (300, 100), 11, "sks, x")
    many = workspace / "datasets/many"
    for number in range(MANY):
        draw(many / f"{number:03d}.png", (16, 16), number, f"number {number}, tag")
    (workspace / "datasets/empty").mkdir()
    make(workspace / "root/photos", 1)
    with served(workspace) as running:
        yield running


def scroll(page, share):
    """Scroll the grid to that share of its height, and wait until the cards are asked for and drawn."""
    page.locator(".st-grid").evaluate("(grid, share) => { grid.scrollTop = share * grid.scrollHeight; }", share)
    page.wait_for_timeout(200)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_in_the_tab_has_a_fault_against_wcag_aa(browser, server, theme, width):
    with opened(browser, server.address, width, theme, motion="reduce") as page:
        use(page, server.workspace / "datasets/odd", 6)
        page.wait_for_timeout(400)
        card(page, "00.png").click()
        assert faults(page) == []
        page.get_by_label("View", exact=True).select_option("tags")
        page.get_by_role("combobox", name="Add a tag to 02.png").press_sequentially("s")
        expect(page.get_by_role("option", name="sks")).to_be_visible()
        assert faults(page) == []
        for name in PANELS:
            shown = panel(page, name)
            if name == "Bulk edit":
                shown.get_by_label("Find").fill("a")
                expect(shown.locator("del").first).to_be_visible()
            page.wait_for_timeout(400)
            assert faults(page) == [], name
        button(page, "Close").click()
        for opener in ("Trash…", "Move or copy…", "Open a folder…", "New…"):
            button(page, opener).click()
            expect(page.get_by_role("dialog")).to_be_visible()
            assert faults(page) == [], opener
            page.keyboard.press("Escape")
        page.get_by_role("button", name="Open 02.png").click()
        expect(page.get_by_role("dialog")).to_contain_text("96 × 64 pixels")
        page.get_by_label("Show what training keeps of it").check()
        expect(page.get_by_role("dialog")).to_contain_text("is cut off")
        assert faults(page) == []


@pytest.mark.parametrize("width", [390, 768, 1440, 2560])
def test_no_width_makes_the_tab_scroll_sideways(browser, server, width):
    with opened(browser, server.address, width) as page:
        use(page, server.workspace / "datasets/odd", 6)
        for name in PANELS:
            panel(page, name)
            page.wait_for_timeout(150)
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name


def test_of_many_images_only_those_that_are_seen_are_on_the_page(browser, server):
    with opened(browser, server.address) as page:
        use(page, server.workspace / "datasets/many", MANY)
        for share in (0.3, 1, 0.5):
            scroll(page, share)
            assert page.locator(".st-tile").count() < 50
        names = page.evaluate("[...document.querySelectorAll('.st-tile .st-file')].map((file) => file.textContent)")
        assert names == sorted(names)  # the order of the page is that of the list, for Tab and screen readers
        assert page.evaluate("document.querySelectorAll('.st-tile[aria-posinset]').length") == len(names)


def test_a_caption_being_typed_survives_scrolling_away(browser, server):
    with opened(browser, server.address) as page:
        use(page, server.workspace / "datasets/many", MANY)
        caption(page, "000.png").fill("half a cap")
        page.locator(".st-grid").evaluate("element => { element.scrollTop = element.scrollHeight; }")
        expect(caption(page, "399.png")).to_be_visible()
        page.keyboard.type("tion")
        page.keyboard.press("Control+Enter")
        expect(caption(page, "001.png")).to_be_focused()
        expect(caption(page, "000.png")).to_have_value("half a caption")
        undo(page).click()
        expect(caption(page, "000.png")).to_have_value("number 0, tag")


def test_a_caption_typed_in_the_large_view_is_kept_when_the_grid_shows_other_images(browser, server):
    many = server.workspace / "datasets/many"
    with opened(browser, server.address) as page:
        use(page, many, MANY)
        card(page, "000.png").focus()
        page.keyboard.press("End")
        page.keyboard.press("Enter")
        large = page.get_by_label("Caption", exact=True)
        expect(large).to_have_value("number 399, tag")
        page.locator(".st-grid").evaluate("element => { element.scrollTop = 0; }")
        expect(caption(page, "399.png")).to_have_count(0)
        (many / "001.txt").write_text("by another program")
        expect(caption(page, "001.png")).to_have_value("by another program")
        large.fill("typed large")
        button(page, "Close").last.click()
        expect(undo(page)).to_have_text("Undo: edit the caption of 399.png")
        assert (many / "399.txt").read_text() == "typed large"
        undo(page).click()
        expect(undo(page)).not_to_contain_text("399.png")
    (many / "001.txt").write_text("number 1, tag")


def test_a_caption_that_could_not_be_saved_survives_a_reload(browser, server):
    with opened(browser, server.address) as page:
        use(page, server.workspace / "datasets/many", MANY)
        server.kill()
        caption(page, "002.png").fill("typed while the server was away")
        caption(page, "003.png").focus()
        expect(page.get_by_text("not saved yet: trying again")).to_be_visible()
        server.start()
        page.reload()
        page.get_by_role("tab", name="Data set").click()
        expect(caption(page, "002.png")).to_have_value("typed while the server was away")
        expect(undo(page)).to_have_text("Undo: edit the caption of 002.png")
        undo(page).click()
        expect(caption(page, "002.png")).to_have_value("number 2, tag")


def test_what_is_typed_while_another_data_set_opens_is_not_lost(browser, server):
    many = server.workspace / "datasets/many"
    with opened(browser, server.address) as page:
        use(page, many, MANY)
        caption(page, "005.png").fill("typed, and then away")
        page.locator("#studio-dataset").select_option(label="odd")
        expect(page.locator(".st-set-facts")).to_contain_text("datasets/odd")
        page.locator("#studio-dataset").select_option(label="many")
        expect(caption(page, "005.png")).to_have_value("typed, and then away")
        assert (many / "005.txt").read_text() == "typed, and then away"
        undo(page).click()
        expect(caption(page, "005.png")).to_have_value("number 5, tag")
        (server.workspace / "datasets/gone").mkdir()
        use(page, many, MANY)
        expect(page.locator("#studio-dataset option", has_text="gone")).to_be_attached()
        (server.workspace / "datasets/gone").rmdir()
        page.locator("#studio-dataset").select_option(label="gone")
        expect(page.get_by_text("there is no folder gone any more")).to_be_visible()
        expect(page.locator("#studio-dataset option:checked")).to_have_text("many")


def test_files_are_taken_where_they_are_dropped(browser, server, tmp_path):
    draw(tmp_path / "a.png", seed=5)
    with opened(browser, server.address) as page:
        use(page, server.workspace / "datasets/empty", 0)
        dropped = page.evaluate_handle(
            "bytes => { const data = new DataTransfer(); data.items.add(new File([new Uint8Array(bytes)], 'a.png', "
            "{type: 'image/png'})); return data; }", list((tmp_path / "a.png").read_bytes()))
        page.locator(".st-data").dispatch_event("dragenter", {"dataTransfer": dropped})
        expect(page.locator(".st-data.st-dropping")).to_have_count(1)
        page.locator(".st-data").dispatch_event("drop", {"dataTransfer": dropped})
        expect(page.get_by_text("Added 1 image.")).to_be_visible()
        expect(page.get_by_role("button", name=re.compile(r"^a\.png"))).to_be_visible()


def test_files_come_to_the_data_set_on_which_they_were_dropped(browser, server, tmp_path):
    first, other = (make(server.workspace / "datasets" / name, 1) for name in ("first", "other"))
    file = draw(tmp_path / "new.png", seed=50)
    with opened(browser, server.address) as page:
        use(page, first, 1)
        page.evaluate("""() => {
            const { send } = Studio;
            Studio.send = async (...all) => {
                const sent = await send(...all);
                await new Promise((go) => { window.arrive = go; });
                return sent;
            };
        }""")
        page.locator(".st-top input[type=file]").first.set_input_files(file)
        page.wait_for_function("window.arrive !== undefined")
        page.locator("#studio-dataset").select_option(label="other")
        expect(page.locator(".st-set-facts")).to_contain_text("datasets/other")
        page.evaluate("window.arrive()")
        expect(page.get_by_text("first: Added 1 image.")).to_be_visible()
    assert (first / "new.png").exists() and not (other / "new.png").exists()


def test_a_mask_that_is_drawn_while_another_data_set_opens_is_saved_where_it_was_drawn(browser, server):
    first, other = (make(server.workspace / "datasets" / name, 1) for name in ("drawn", "undrawn"))
    with opened(browser, server.address) as page:
        use(page, first, 1)
        card(page, "00.png").dblclick()
        button(page, "Draw a mask").click()
        expect(page.get_by_role("application")).to_be_focused()
        page.keyboard.press("Space")
        page.locator("#studio-dataset").evaluate("""choice => {
            choice.value = [...choice.options].find((option) => option.text === "undrawn").value;
            choice.dispatchEvent(new Event("change")); // as if chosen before, and slow to come
        }""")
        expect(page.locator(".st-set-facts")).to_contain_text("datasets/undrawn")
        expect(page.get_by_role("dialog")).to_have_count(0)
    assert (first / "00-masklabel.png").exists() and not (other / "00-masklabel.png").exists()


# Answers that come late


def test_undo_says_what_it_undoes_though_an_older_answer_comes_after_a_change(browser, server):
    with opened(browser, server.address) as page:
        use(page, server.workspace / "datasets/many", MANY)
        before = undo(page).text_content()
        with late(page, "read_info"):
            caption(page, "007.png").fill("typed meanwhile")
            caption(page, "007.png").press("Control+Enter")
            expect(undo(page)).to_have_text("Undo: edit the caption of 007.png")
        assert undo(page).text_content() == "Undo: edit the caption of 007.png"
        with late(page, "read_info"):
            undo(page).click()
            expect(page.get_by_text("Undone: edit the caption of 007.png.")).to_be_visible()
        assert undo(page).text_content() == before


def test_cards_that_a_change_overtakes_are_asked_for_again(browser, server):
    with opened(browser, server.address) as page:
        use(page, server.workspace / "datasets/many", MANY)
        with late(page, "read_cards", lambda: scroll(page, 1)):  # to cards that are not known yet
            button(page, "Choose all").click()
            button(page, "Exclude").click()
            expect(undo(page)).to_have_text(f"Undo: exclude {MANY} images")
        expect(card(page, "399.png")).to_contain_text("excluded")
        undo(page).click()
        expect(card(page, "399.png")).not_to_contain_text("excluded")


def test_an_older_card_never_takes_the_place_of_a_younger_one(browser, server):
    file = server.workspace / "datasets/many/000.txt"
    with opened(browser, server.address) as page:
        use(page, file.parent, MANY)
        card(page, "000.png").dblclick()
        with late(page, "read_cards", button(page, "Close").last.click):
            file.write_text("by another program")
            expect(caption(page, "000.png")).to_have_value("by another program")
        assert caption(page, "000.png").input_value() == "by another program"
    file.write_text("number 0, tag")


def test_the_next_image_large_is_not_as_it_was_before_an_undo(browser, server):
    with opened(browser, server.address) as page:
        use(page, server.workspace / "datasets/many", MANY)
        scroll(page, 0.7)
        last = page.locator(".st-tile .st-file").last.text_content()
        number = int(last.removesuffix(".png")) + 1
        following = f"{number}.png"  # its card is not known here
        scroll(page, 0.75)
        caption(page, following).fill("to be undone")
        caption(page, following).press("Control+Enter")
        expect(undo(page)).to_have_text(f"Undo: edit the caption of {following}")
        use(page, server.workspace / "datasets/many", MANY)
        scroll(page, 0.7)
        page.get_by_role("button", name=f"Open {last}").dispatch_event("click")  # a click would scroll
        with late(page, "read_cards", button(page, "Next →").click):
            behind = page.locator(".st-turn").first
            behind.dispatch_event("click")  # as if pressed before the image was opened large
            expect(behind).not_to_contain_text(following)
        expect(page.get_by_role("dialog").get_by_role("heading", name=following)).to_be_visible()
        assert page.get_by_label("Caption", exact=True).input_value() == f"number {number}, tag"


def test_folders_are_offered_though_the_list_of_data_sets_is_on_its_way(browser, server):
    with opened(browser, server.address) as page:
        page.wait_for_function("globalThis.Studio?.SetStore !== undefined")
        with late(page, "list_sets", page.get_by_role("tab", name="Data set").click):
            button(page, "Open a folder…").first.dblclick()
            expect(button(page, "photos (1 image)")).to_be_visible()
            expect(page.get_by_role("dialog")).to_have_count(1)
