"""The tab Preset in a real browser: form and text in step, faults, differences, files, what it takes, base models."""

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests import models_flux
from tests.app_browser import PRESET, button, chromium, faults, opened, run_in, served  # noqa: F401 - a fixture
from tests.data_sets import wait_for
from trainer import preset

pytestmark = pytest.mark.browser
MINE = "# my own\n" + PRESET.format(steps=5)
SLOW = """(slow) => { const ask = Studio.ask; Studio.ask = async (server, name, request) => {
    if (name === "open_preset") await new Promise((done) => { setTimeout(done, slow[request.name] ?? 0); });
    return ask(server, name, request); }; }"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("app") / "w", pace=0) as running:
        (running.workspace / "presets").mkdir()
        yield running


@pytest.fixture
def page(browser, server):
    """The tab, with the preset "mine" open."""
    shutil.rmtree(server.workspace / "presets")
    (server.workspace / "presets").mkdir()
    (server.workspace / "presets/mine.toml").write_text(MINE)
    with opened(browser, server.address) as page:
        show(page, "own/mine")
        expect(text_of(page)).to_have_value(MINE)
        yield page


def show(page, name=None):
    page.get_by_role("tab", name="Preset").click()
    expect(text_of(page)).not_to_have_value("")
    if name:
        page.get_by_label("Preset", exact=True).select_option(name)


def text_of(page):
    return page.get_by_label("Preset as TOML text")


def file_of(server, name="mine"):
    return server.workspace / f"presets/{name}.toml"


# Form and text


def test_form_and_text_are_in_step_while_one_types(page):
    page.get_by_role("textbox", name="Rank", exact=True).type("8")
    expect(text_of(page)).to_have_value(MINE + "\n[adapter]\nrank = 8\n")
    expect(page.get_by_label("Alpha")).to_have_text("8")
    text_of(page).fill(PRESET.format(steps=77) + "lr = { lora = 1e-4, stella = 2e-4 }  # kept\n")
    expect(page.get_by_label("Steps", exact=True)).to_have_value("77")
    expect(page.get_by_text("This is stella's. Others: lora 1e-4.")).to_be_visible()
    rate = page.get_by_role("textbox", name="Learning rate", exact=True)
    expect(rate).to_have_value("2e-4")
    rate.fill("5e-5")
    expect(text_of(page)).to_have_value(PRESET.format(steps=77) + "lr = { lora = 1e-4, stella = 5e-5 }  # kept\n")
    expect(rate).to_have_value("5e-5")


def test_the_other_settings_are_found_by_their_section_or_by_a_word(page):
    dropout = page.get_by_role("textbox", name="Caption dropout")
    expect(dropout).to_be_hidden()
    page.get_by_text("Images and captions").click()
    dropout.fill("0.1")
    expect(text_of(page)).to_have_value(MINE.replace('"pictures"', '"pictures"\ncaption_dropout = 0.1'))
    expect(page.locator("summary", has_text="Images and captions")).to_contain_text("1 set")
    page.get_by_label("Find a setting").fill("single blocks")
    expect(page.get_by_role("checkbox", name="single blocks")).to_be_visible()
    expect(dropout).to_be_hidden()
    page.get_by_role("checkbox", name="feed forward").check()
    before = MINE.replace('"pictures"', '"pictures"\ncaption_dropout = 0.1')
    expect(text_of(page)).to_have_value(before + '\n[adapter]\ntargets = ["attention", "feed_forward"]\n')


def test_faults_are_told_as_one_types_at_field_line_and_list(page):
    text_of(page).fill(PRESET.format(steps="-3") + "lrr = 1\n")
    fault = page.get_by_role("button", name="mine.toml:8: train.lrr: no such key. Did you mean lr?")
    fault.click()
    assert page.evaluate("document.activeElement.className") == "st-toml"
    typed = text_of(page).input_value()
    assert typed[:page.evaluate("document.activeElement.selectionStart")].count("\n") == 7
    expect(page.locator(".st-marked")).to_have_text(["7", "8"])
    steps = page.get_by_label("Steps", exact=True)
    expect(steps).to_have_attribute("aria-invalid", "true")
    with pytest.raises(preset.UserError) as error:
        preset.parse(typed, "mine.toml")
    told = page.get_by_label("What is wrong with the preset").get_by_role("listitem")
    expect(told).to_contain_text(str(error.value).splitlines())
    button(page, "Show the field Steps").click()
    expect(steps).to_be_focused()
    expect(button(page, "Start training")).to_be_disabled()


def test_a_broken_text_is_kept_and_the_form_waits(page):
    text_of(page).fill("x = = 1")
    expect(page.get_by_text("The text is not valid TOML at the moment")).to_be_visible()
    expect(page.get_by_label("Steps", exact=True)).to_be_disabled()
    page.wait_for_timeout(500)
    page.reload()
    show(page)
    expect(text_of(page)).to_have_value("x = = 1")
    text_of(page).fill(PRESET.format(steps=3))
    expect(button(page, "Start training")).to_be_enabled()
    expect(page.locator(".st-marked")).to_have_count(0)


@pytest.mark.timed
def test_typing_is_answered_within_a_tenth_of_a_second(page):
    page.get_by_label("Preset", exact=True).select_option("shipped/demo")
    expect(text_of(page)).not_to_have_value(MINE)
    took = page.evaluate("""async () => {
        const times = [];
        const fetched = window.fetch;
        window.fetch = async (...asked) => {
            const begun = performance.now();
            const answer = await fetched(...asked);
            times.push(performance.now() - begun);
            return answer;
        };
        const area = document.querySelector('.st-toml');
        for (let step = 0; step < 9; step += 1) {
            area.value += ' ';
            area.dispatchEvent(new Event('input', {bubbles: true}));
            await new Promise((done) => setTimeout(done, 400));
        }
        window.fetch = fetched;
        return times.sort((a, b) => a - b)[0];
    }""")
    assert took < 100


@pytest.mark.timed
def test_the_tab_opens_at_once(browser, server):
    with opened(browser, server.address) as page:
        page.get_by_role("tab", name="Preset").wait_for()
        page.wait_for_timeout(1000)
        took = page.evaluate("""async () => {
            const begun = performance.now();
            Studio.goTo('Preset');
            while (!document.querySelector('.st-toml')?.offsetParent) await new Promise(requestAnimationFrame);
            await new Promise(requestAnimationFrame);
            return performance.now() - begun;
        }""")
        assert took < 900  # 0.3 s on an idle machine


# Differences


def test_differences_from_the_shipped_preset_are_marked_and_taken_back(page):
    page.get_by_label("Preset", exact=True).select_option("shipped/demo")
    expect(page.get_by_text("No difference from the shipped preset demo")).to_be_visible()
    shipped = preset.parse(text_of(page).input_value(), "demo")
    page.get_by_role("textbox", name="Rank", exact=True).fill("4")
    page.get_by_label("Trigger word").fill("")
    expect(page.get_by_text("Shipped: 8.")).to_be_visible()
    page.get_by_text("2 differences from the shipped preset demo").click()
    row = page.get_by_role("row", name="Trigger word")
    expect(row).to_contain_text("openmoji style")
    expect(row).to_contain_text("left out")
    row.get_by_role("button", name="back to the shipped value").click()
    page.get_by_text("1 difference from the shipped preset demo").wait_for()
    button(page, "Rank: back to the shipped value").first.click()
    expect(page.get_by_text("No difference from the shipped preset demo")).to_be_visible()
    assert preset.parse(text_of(page).input_value(), "demo") == shipped
    page.locator("#studio-reference").select_option("sd15_stella")
    expect(page.get_by_text("differences from the shipped preset sd15_stella")).to_be_visible()


# Files


def test_unsaved_text_survives_a_reload_another_preset_and_a_reset(page, server):
    text_of(page).fill(PRESET.format(steps=99))
    page.wait_for_timeout(400)
    page.reload()
    show(page)
    expect(page.get_by_text("Your unsaved changes to mine are here again.")).to_be_visible()
    expect(text_of(page)).to_have_value(PRESET.format(steps=99))
    page.get_by_label("Preset", exact=True).select_option("shipped/demo")
    expect(page.get_by_text("Your unsaved changes to mine were set aside.")).to_be_visible()
    button(page, "Bring them back").click()
    expect(text_of(page)).to_have_value(PRESET.format(steps=99))
    button(page, "Reset").click()
    expect(text_of(page)).to_have_value(MINE)
    button(page, "Undo").click()
    expect(text_of(page)).to_have_value(PRESET.format(steps=99))
    assert file_of(server).read_text() == MINE


def test_save_save_as_and_duplicate(page, server):
    text_of(page).fill(PRESET.format(steps=12))
    button(page, "Save as…").click()
    page.get_by_label("Name", exact=True).fill("mine")
    page.get_by_role("dialog").get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("You have a preset of that name")).to_be_visible()
    button(page, "Cancel").click()
    assert file_of(server).read_text() == MINE
    text_of(page).press("Control+s")
    expect(page.get_by_text("Saved as mine.")).to_be_visible()
    assert file_of(server).read_text() == PRESET.format(steps=12)
    button(page, "Duplicate").click()
    expect(page.get_by_text("mine-2 is a copy of mine.")).to_be_visible()
    assert file_of(server, "mine-2").read_text() == PRESET.format(steps=12)
    page.get_by_label("Preset", exact=True).select_option("shipped/demo")
    expect(button(page, "Delete")).to_be_hidden()
    text_of(page).press("Control+s")
    page.get_by_label("Name", exact=True).fill("from demo")
    page.get_by_label("Name", exact=True).press("Enter")
    expect(page.get_by_text("Saved as from demo.")).to_be_visible()
    assert preset.load(file_of(server, "from demo")).data.folder == str(preset.SHIPPED / "demo/concept")


def test_the_second_of_two_people_saves_over_nothing_unasked(page, server, browser):
    with opened(browser, server.address) as other:
        show(other, "own/mine")
        expect(text_of(other)).to_have_value(MINE)
        text_of(other).fill(PRESET.format(steps=6))
        button(other, "Save").click()
        expect(other.get_by_text("Saved as mine.")).to_be_visible()
    text_of(page).fill(PRESET.format(steps=7))
    button(page, "Save").click()
    expect(page.get_by_text("mine was changed by somebody else since you opened it.")).to_be_visible()
    assert file_of(server).read_text() == PRESET.format(steps=6)
    button(page, "Show theirs").click()
    expect(text_of(page)).to_have_value(PRESET.format(steps=6))
    button(page, "Bring mine back").click()
    expect(text_of(page)).to_have_value(PRESET.format(steps=7))
    button(page, "Save").click()
    button(page, "Overwrite it").click()
    expect(page.get_by_text("Saved as mine; what was there is in the trash.")).to_be_visible()
    assert file_of(server).read_text() == PRESET.format(steps=7)
    button(page, "Undo").click()
    expect(page.get_by_text("What was there before is back.")).to_be_visible()
    expect(text_of(page)).to_have_value(PRESET.format(steps=6))
    button(page, "Undo").click()
    expect(page.get_by_text("Yours is back.")).to_be_visible()
    expect(text_of(page)).to_have_value(PRESET.format(steps=7))


def test_a_deleted_preset_is_in_the_trash_and_comes_back(page, server):
    button(page, "Delete").click()
    expect(page.get_by_text("mine is in the trash.")).to_be_visible()
    assert not file_of(server).exists() and list((server.workspace / "trash/presets").glob("*-mine.toml"))
    expect(page.get_by_label("Preset", exact=True)).not_to_have_value("own/mine")
    button(page, "Undo").click()
    expect(text_of(page)).to_have_value(MINE)
    assert file_of(server).read_text() == MINE


# What it takes, and the start


def test_what_training_takes_is_told_and_follows_the_text(page):
    panel = page.get_by_role("region", name="What it takes")
    expect(panel.get_by_text("Ready to train.")).to_be_visible()
    expect(panel.get_by_text("5.0 of 22.0 GiB of GPU memory")).to_be_visible()
    expect(panel.get_by_text("weights in FP8, gradient checkpointing")).to_be_visible()
    expect(panel.get_by_text("24 to train on, 6 held out")).to_be_visible()
    expect(panel.get_by_text("512×512: 20, 448×576: 4")).to_be_visible()
    page.get_by_role("textbox", name="Batch size").fill("64")
    expect(panel.get_by_text("Looking at the base model")).to_be_visible()
    page.get_by_role("textbox", name="Batch size").fill("8")  # the one before is stopped
    expect(panel.get_by_text("40.0 of 22.0 GiB of GPU memory: too much")).to_be_visible()
    expect(panel.get_by_text("this will hardly fit")).to_be_visible()
    page.get_by_role("textbox", name="Images (needed)").fill("missing")
    expect(panel.get_by_text("This cannot be trained yet.")).to_be_visible()
    expect(panel.get_by_text("missing does not exist")).to_be_visible()
    page.get_by_role("textbox", name="Batch size").fill("0")
    expect(panel.get_by_text("Mend the faults first")).to_be_visible()


def test_while_another_run_is_trained_it_is_looked_at_only_when_asked_and_the_start_waits(browser, tmp_path):
    with served(tmp_path / "w", pace=0.5) as server:
        run_in(server.workspace, "long", rows=5)
        file_of(server).parent.mkdir()
        file_of(server).write_text(MINE)
        with opened(browser, server.address) as page:
            button(page, "Resume from step 5").click()
            expect(page.locator(".st-run .st-badge")).to_have_text("training")
            show(page, "own/mine")
            expect(page.get_by_text("Another run is being trained")).to_be_visible()
            button(page, "Check anyway").click()
            expect(page.get_by_text("Ready to train.")).to_be_visible()
            page.get_by_role("textbox", name="Name of the run").fill("next")
            button(page, "Add to queue").click()
            expect(page.get_by_role("tab", name="Train")).to_have_attribute("aria-selected", "true")
            assert [file.name for file in (server.workspace / "queue").glob("*.toml")] == ["0001-next.toml"]


def test_an_edited_preset_is_trained_as_it_stands(page):
    text_of(page).fill(PRESET.format(steps=7))
    page.get_by_role("textbox", name="Name of the run").fill("edited")
    button(page, "Start training").click()
    expect(page.get_by_role("heading", name="edited")).to_be_visible()
    expect(page.locator(".st-run .st-badge")).to_have_text("done")
    expect(page.get_by_text("7 of 7").first).to_be_visible()


def test_a_preset_that_is_on_its_way_is_the_one_that_is_started(page, server):
    """Buttons act on what the list shows, though the page may still hold the preset before it."""
    for number in (5, 6):
        file_of(server, f"steps-{number}").write_text(PRESET.format(steps=number))
    page.reload()
    show(page)
    page.evaluate(SLOW, {"steps-5": 1200, "steps-6": 300})
    chosen = page.get_by_label("Preset", exact=True)
    chosen.select_option("own/steps-5")
    chosen.select_option("own/steps-6")
    button(page, "Start training").click()
    started = server.workspace / "runs/steps-6/preset.toml"
    wait_for(started.exists)
    assert preset.load(started).train.steps == 6
    page.wait_for_timeout(1200)  # the answer that comes too late
    expect(chosen).to_have_value("own/steps-6")
    expect(text_of(page)).to_have_value(PRESET.format(steps=6))


def test_a_preset_that_cannot_be_opened_starts_nothing_and_leaves_the_list_as_it_was(page, server):
    file_of(server, "going").write_text(PRESET.format(steps=5))
    page.reload()
    show(page, "own/mine")
    expect(text_of(page)).to_have_value(MINE)
    file_of(server, "going").unlink()
    before = sorted(server.workspace.glob("runs/*"))
    page.evaluate(SLOW, {"going": 500})
    page.get_by_label("Preset", exact=True).select_option("own/going")
    button(page, "Start training").click()
    expect(page.get_by_text("there is no preset 'going'")).to_be_visible()
    expect(page.get_by_label("Preset", exact=True)).to_have_value("own/mine")
    assert sorted(server.workspace.glob("runs/*")) == before


def test_a_base_model_of_another_program_is_chosen_with_its_parts(page, server, tmp_path):
    kept = server.workspace / "models"  # base models that were made here are listed like those of other programs
    files = models_flux.split_files(tmp_path / "files", models_flux.flux1_folder(tmp_path / "flux1"))
    for name, file in files.items():
        kept.mkdir(exist_ok=True)
        shutil.copy(file, kept / f"{name}.safetensors")
    text_of(page).fill(MINE.replace("sd15", "flux1"))
    button(page, "Choose one on this computer…").click()
    dialog = page.get_by_role("dialog", name="Base models on this computer")
    expect(dialog.get_by_text("1 found.")).to_be_visible()
    assert faults(page) == []
    dialog.get_by_role("button", name="transformer").click()
    expect(dialog).to_be_hidden()
    expect(page.get_by_text("The base model is transformer now.")).to_be_visible()
    model = preset.parse(text_of(page).input_value(), "mine.toml").model
    assert (model.base, model.vae) == (str(kept / "transformer.safetensors"), str(kept / "vae.safetensors"))
    assert Path(model.text_encoder_2).is_file() and model.tokenizer_2 == "google-t5/t5-base"


# How it looks


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wrong_against_wcag_aa_nor_scrolls_sideways(browser, server, theme, width):
    with opened(browser, server.address, width, theme, motion="reduce") as page:
        show(page, "shipped/demo")
        expect(page.get_by_text("Ready to train.")).to_be_visible()
        page.get_by_role("textbox", name="Rank", exact=True).fill("4")
        page.get_by_text("1 difference from").click()
        for group in page.locator(".st-group summary").all():
            group.click()
        page.get_by_role("textbox", name="Batch size").fill("-8")
        expect(page.locator(".st-marked")).to_have_count(1)
        assert faults(page) == []
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_all_can_be_reached_by_keyboard(page):
    page.get_by_label("Preset", exact=True).focus()
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert reached[:3] == ["Save as…", "Duplicate", "Delete"] and "studio-run" in reached, reached
