"""The tab "Export" in a real browser: from a run's file to one for a program, checked and downloaded; the workshop."""

import shutil

import pytest
import torch
from playwright.sync_api import expect

from tests.app_browser import button, chromium, faults, opened, run_in, served  # noqa: F401 - a fixture
from trainer.export.convert import convert
from trainer.export.lora_file import open_lora
from trainer.export.sizes import true_sizes
from trainer.export.texts import Labels
from trainer.export.writer import write

pytestmark = pytest.mark.browser


def lora(path, seed):
    """A LoRA of SDXL's true sizes for the attention of its middle block."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [(name, torch.randn(shape[0], 3, generator=generator), torch.randn(3, shape[1], generator=generator), None)
             for name, shape in true_sizes("sdxl")["SDXL"].items() if ".attn" in name and "unet.mid_block" in name]
    write(path, pairs, family="sdxl", dtype="fp16", metadata={})
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An app with a run of two checkpoints, and one file that was made before."""
    folder = tmp_path_factory.mktemp("app")
    run = run_in(folder / "w", "my-style", rows=5)
    convert(lora(folder / "raw.safetensors", 5), "auto", run.result,
            labels=Labels("My style", triggers=("ohwx style",)))
    run.exports.mkdir(exist_ok=True)
    shutil.copy(run.result, run.exports / "my-style-000500.safetensors")
    (folder / "w" / "exports").mkdir()
    lora(folder / "w" / "exports" / "other.safetensors", 8)
    with served(folder / "w") as running:
        yield running


def test_a_file_for_a_program_is_made_checked_and_downloaded(browser, server):
    with opened(browser, server.address) as page:
        page.get_by_role("tab", name="Export").click()
        form = page.get_by_role("form", name="Export", exact=True)
        expect(form.get_by_text("For SDXL · rank 3 · 80 layers")).to_be_visible()
        form.get_by_label("Checkpoint").select_option(label="step 500")
        expect(form.get_by_label("Name of the new file")).to_have_value("my-style-000500")
        form.get_by_label("A1111").focus()
        page.keyboard.press("Space")
        form.get_by_label("Name of the new file").fill("night")
        form.get_by_text("Title, author, trigger words, cover").click()
        expect(form.get_by_label("Trigger words")).to_have_value("ohwx style")
        form.get_by_label("Author").fill("Ada")
        button(form, "Export").click()
        card = page.get_by_role("region", name="night")
        expect(card.get_by_text("A1111 reads all 80 layers at full strength.")).to_be_visible(timeout=60_000)
        expect(card.get_by_role("listitem").first).to_contain_text("A1111")  # the one that was asked for
        expect(card.get_by_text("<lora:night:1>")).to_be_visible()
        expect(card.get_by_text("models/Lora of your program")).to_be_visible()
        with page.expect_download() as download:
            card.get_by_role("link", name="Download night.safetensors").click()
        lora = open_lora(download.value.path())
        assert lora.metadata["modelspec.author"] == "Ada" and lora.metadata["ss_output_name"] == "night"
        assert lora.format.name == "U2" and faults(page) == []
        button(form, "Export").click()
        expect(page.get_by_role("region", name="night-2")).to_be_visible()  # a free name was there already
        expect(form.get_by_label("Author")).to_have_value("Ada")  # the new file in the list resets nothing


def test_the_workshop_resizes_and_compares(browser, server):
    with opened(browser, server.address, width=390, theme="dark") as page:
        page.get_by_role("tab", name="Export").click()
        tools = page.get_by_role("region", name="Workshop")
        button(tools, "Resize").click()
        form = tools.get_by_role("form", name="Resize")
        expect(form.get_by_label("Name of the new file")).to_have_value("my-style-small")
        form.get_by_label("Rank", exact=True).fill("none")
        button(form, "Resize").click()
        expect(form.get_by_text("Rank: give a whole number from 1 on.")).to_be_visible()
        form.get_by_label("Rank", exact=True).fill("2")
        form.get_by_label("Name of the new file").fill("small")
        button(form, "Resize").click()
        card = page.get_by_role("region", name="small")
        expect(card.get_by_text("of the change is kept in all")).to_be_visible(timeout=60_000)
        button(tools, "Compare").click()
        form = tools.get_by_role("form", name="Compare")
        form.get_by_label("File 2").select_option(label="other.safetensors")
        button(form, "Compare").click()
        expect(page.get_by_text("80 layers are changed by both")).to_be_visible(timeout=60_000)
        page.get_by_text("The layers where they overlap most").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390 and faults(page) == []


CARD = """async () => {
    const answers = [{ word: "working", done: 1, of: 9 }, null, null, { word: "failed", text: "so it ended" }];
    const card = new Studio.ExportCard({ read_task: () => answers.shift() }, "1", { label: "x" });
    const told = [];
    new MutationObserver(() => told.push(card.text.textContent)).observe(card.text, { childList: true });
    await card.follow();
    return told;
}"""


def test_a_tool_is_followed_over_a_broken_connection(browser, server):
    with opened(browser, server.address) as page:
        page.wait_for_function("globalThis.Studio?.ExportCard !== undefined")
        page.route("**/config", lambda route: route.abort())
        assert page.evaluate(CARD) == ["1 of 9 layers", "so it ended"]
        expect(page.locator("#studio-connection")).to_be_empty()
