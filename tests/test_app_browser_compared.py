"""A comparison of three methods on the demo, from the form of the tab "Compare" to its report."""

from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.app_browser import button, chromium, curve, faults, opened  # noqa: F401 - a fixture
from tests.test_app_browser_path import real_app
from tests.test_compared import METHODS, SMALL
from tests.test_report import whole
from trainer import preset as presets

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_three_methods_on_the_demo_from_the_form_to_the_report(browser, tmp_path):
    workspace = tmp_path / "w"
    (workspace / "presets").mkdir(parents=True)
    demo = presets.load(presets.SHIPPED / "demo.toml", SMALL)
    (workspace / "presets" / "small demo.toml").write_text(presets.dumps(demo), "utf-8")
    with real_app(workspace) as address, opened(browser, address) as page:
        page.get_by_role("tab", name="Compare").click()
        button(page, "New comparison").click()
        form = page.get_by_role("form", name="New comparison")
        form.get_by_label("Preset").select_option(label="small demo")
        form.get_by_label("Seeds").fill("0")
        form.get_by_label("Name").fill("methods")
        button(form, "Start 3 runs").click()
        expect(page.get_by_text("3 runs: 3 done.")).to_be_visible(timeout=240_000)
        numbers = page.get_by_role("region", name="Numbers of the settings")
        for method in METHODS:
            expect(numbers.get_by_role("row", name=method)).to_be_visible()
        expect(curve(page, "Validation loss")).to_be_visible()
        assert faults(page) == []
        with page.expect_download() as download:
            button(page, "Save report").click()
        report = whole(Path(download.value.path()).read_text("utf-8"))
    text = " ".join(report.text)
    assert "3 runs of 3 settings" in text and "Samples at step 6" in text
    assert all(part in text for part in (*METHODS, "Validation loss", "KID ×10³ against time"))
