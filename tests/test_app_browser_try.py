"""The tab "Export" with base models, in a real browser: a LoRA tried out, put into a base, cancelled, added."""

import shutil

import pytest
from playwright.sync_api import expect

from tests.app_browser import button, chromium, faults, opened, served  # noqa: F401 - a fixture
from tests.family_runs import MAKERS
from tests.test_tryout_bench import lora
from trainer import run as runs

pytestmark = pytest.mark.browser
PRESET = """[model]
family = "sd15"
base = "{base}"
[data]
folder = "d"
[train]
steps = 3
[sample]
prompts = ["a red circle"]
steps = 3
"""
SLOW = 90_000  # milliseconds: a process begins by loading torch


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An app with a run's file for a base that is here, and a LoRA elsewhere on the disk."""
    folder = tmp_path_factory.mktemp("app")
    base = MAKERS["sd15"](folder / "base")
    run = runs.create(folder / "w", "circles", PRESET.format(base=base.as_posix()))
    lora(run.result, base, "sd15")
    shutil.copy(run.result, folder / "mine.safetensors")
    with served(folder / "w") as running:
        yield running
    for task in (folder / "w" / "tryouts").glob("*/control"):
        (task / "stop").touch()


def test_a_lora_is_tried_out_at_several_strengths_and_without(browser, server):
    with opened(browser, server.address) as page:
        page.get_by_role("tab", name="Export").click()
        form = page.get_by_role("form", name="Try it")
        expect(form.get_by_label("Prompt", exact=True)).to_have_value("a red circle")
        expect(form.get_by_label("Base model", exact=True)).to_contain_text("base (of circles)")
        button(form, "Draw").click()
        expect(form.get_by_text("Drawn in")).to_be_visible(timeout=SLOW)
        first = form.get_by_role("img", name="With it, strength 1.00: a red circle")
        expect(first).to_be_visible()
        plain = form.get_by_role("img", name="Without it: a red circle").get_attribute("src")
        assert page.evaluate("(image) => image.naturalWidth", first.element_handle()) == 64  # as the file was trained
        form.get_by_role("slider", name="Strength").focus()
        page.keyboard.press("ArrowLeft")  # another strength is drawn at once, over the model that is loaded
        expect(form.get_by_role("img", name="With it, strength 0.95: a red circle")).to_be_visible(timeout=SLOW)
        assert form.get_by_role("img", name="Without it: a red circle").get_attribute("src") == plain
        assert len(list((server.workspace / "tryouts").iterdir())) == 1 and faults(page) == []
        form.get_by_label("Seed").fill("many")
        button(form, "Draw").click()
        expect(form.get_by_text("Seed: give a whole number up to 4294967295.")).to_be_visible()
        button(form, "Put the model away").click()
        expect(form.get_by_text("The model was put away")).to_be_visible()


def test_a_lora_is_put_into_its_base_and_a_file_is_added(browser, server):
    with opened(browser, server.address, width=390, theme="dark") as page:
        page.get_by_role("tab", name="Export").click()
        form = page.get_by_role("form", name="Export", exact=True)
        form.locator("input[type=file]").set_input_files(server.workspace.parent / "base" / "model_index.json")
        expect(form.get_by_text("is no .safetensors file")).to_be_visible()
        form.locator("input[type=file]").set_input_files(server.workspace.parent / "mine.safetensors")
        expect(form.get_by_label("LoRA", exact=True)).to_contain_text("mine.safetensors")
        expect(form.get_by_label("Name of the new file")).to_have_value("mine-2")
        form.get_by_text("Check against a base model").click()
        form.get_by_label("Check against", exact=True).select_option(label="The family's usual sizes")
        expect(form.get_by_label("Check against", exact=True)).to_contain_text("base (of circles)")
        tools = page.get_by_role("region", name="Workshop")
        button(tools, "Put into a base").click()
        bake = tools.get_by_role("form", name="Put into a base")
        expect(bake.get_by_text("are free")).to_be_visible()
        button(bake, "Write the model").click()
        card = page.get_by_role("region", name="baked")
        expect(card.get_by_text("a diffusers folder")).to_be_visible(timeout=SLOW)
        expect(card.get_by_text(f"On this machine: {server.workspace / 'models' / 'baked'}")).to_be_visible()
        button(bake, "Write the model").click()
        expect(bake.get_by_text("there is already a base model called baked")).to_be_visible()
        button(tools, "Extract").click()
        extract = tools.get_by_role("form", name="Extract")
        expect(extract.get_by_label("After", exact=True)).not_to_have_value("")
        chosen = [extract.get_by_label(name, exact=True).input_value() for name in ("Before", "After")]
        assert chosen[0] and chosen[1] and chosen[0] != chosen[1]
        button(extract, "Extract").click()
        cancelled = page.get_by_role("region", name="extracted")
        button(cancelled, "Cancel").click()
        expect(cancelled.get_by_text("Cancelled. Nothing was written.")).to_be_visible(timeout=SLOW)
        assert not (server.workspace / "exports" / "extracted.safetensors").exists()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390 and faults(page) == []
