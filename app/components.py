"""The app's own components: `gr.HTML` with our scripts, which call a few functions of the server."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.errors import UserError

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("core.js", "help.js", "series.js", "chart.js", "panels.js", "bins.js", "heat.js", "hard.js",
           "sample_viewer.js", "samples.js", "checkpoints.js", "run_notes.js", "run_menu.js", "run_results.js",
           "run_controls.js", "run_view.js", "run_queue.js", "run_list.js", "preset_text.js", "preset_form.js",
           "preset_files.js", "preset_check.js", "preset_bases.js", "preset_cards.js", "preset_editor.js",
           "first_run.js", "dataset_dialogs.js", "dataset_store.js",
           "dataset_card.js", "dataset_chips.js", "dataset_grid.js", "dataset_mask.js", "dataset_viewer.js",
           "dataset_training.js", "dataset_bulk.js", "dataset_overview.js", "dataset_health.js",
           "dataset_captioning.js", "dataset_upload.js", "dataset_page.js",
           "export_result.js", "export_tools.js", "export_models.js", "export_try.js", "export_page.js",
           "compare_form.js", "compare_table.js", "compare_charts.js", "compare_page.js")
STYLES = ("style.css", "first_run.css", "run.css", "preset.css", "dataset.css", "export.css", "compare.css")
Answer = dict[str, Any]
FAULT = "The app has a fault here"
LOG = logging.getLogger(__name__)


class Request(BaseModel):
    """What a page may send: exactly these fields, of exactly these types."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


Asked = TypeVar("Asked", bound=Request)


def server_function(name: str, request: type[Asked], work: Callable[[Asked], Answer]) -> Callable[[Any], Answer]:
    """A function that a page may call as `server.<name>(object)`; anybody may call it with any JSON.

    What a user can cause comes back as `{"error": sentence}`.  So does a fault of ours, whose trace goes to the
    terminal: an answer that failed would be taken by the page for a server that is gone.
    """

    def function(data: Any) -> Answer:
        try:
            return work(request.model_validate(data))
        except ValidationError:
            return {"error": "this page and the app do not understand each other; reload the page"}
        except UserError as error:
            return {"error": str(error)}
        except OSError as error:
            return {"error": f"{error.filename or 'the disk'}: {error.strerror or error}"}
        except Exception as error:
            LOG.exception("%s failed", name)
            return {"error": f"{FAULT} ({name}: {type(error).__name__}); its terminal says more. Training goes on"}

    function.__name__ = name
    function.request = request  # type: ignore[attr-defined] - so that what may be asked can be read off the page
    return function


class OwnComponent(gr.HTML):
    """An empty element that one of our scripts fills."""

    SCRIPT = ""  # the function in `assets` that fills it

    def __init__(self, functions: list[Callable[[Any], Answer]], data: Any = None, elem_id: str = "") -> None:
        call = f"Studio.{self.SCRIPT}(element, server, {json.dumps(data)})"
        # The page's head may be run after the first component is made
        waiting = f"(function begin() {{ globalThis.Studio?.isReady ? {call} : setTimeout(begin, 20); }})();"
        super().__init__("", html_template=f'<div class="studio-{self.SCRIPT.lower()}"></div>', js_on_load=waiting,
                         apply_default_css=False, elem_id=elem_id, server_functions=functions)


class Header(OwnComponent):
    SCRIPT = "header"


class FirstRun(OwnComponent):
    SCRIPT = "firstRun"


class RunList(OwnComponent):
    SCRIPT = "runList"


class RunView(OwnComponent):
    SCRIPT = "runView"


class PresetEditor(OwnComponent):
    SCRIPT = "presetEditor"


class DataSets(OwnComponent):
    SCRIPT = "dataSets"


class Compare(OwnComponent):
    SCRIPT = "compare"


class Exports(OwnComponent):
    SCRIPT = "exports"


def head() -> str:
    """What stands in the page's head: uPlot from its package, our scripts and styles; nothing comes from the network.

    The styles stand here too, since Gradio rewrites those that it is given, and breaks `:is(a, b)` at the comma.
    """
    sheets = (_uplot() / "uplot.min.css", *(ASSETS / name for name in STYLES))
    styles = [path.read_text(encoding="utf-8") for path in sheets]
    scripts = [(_uplot() / "uplot.iife.min.js").read_text(encoding="utf-8")]
    scripts += [(ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS]
    scripts.append("globalThis.Studio.isReady = true;")
    return "\n".join([f"<style>{text}</style>" for text in styles]
                     + [f"<script>{_in_page(text)}</script>" for text in scripts])


@cache
def _uplot() -> Path:
    """The folder in which the pinned package carries uPlot; the package itself is not imported."""
    package = find_spec("youplot")
    if package is None or package.origin is None:
        raise UserError("the package youplot is not installed; run: python launch.py")
    return Path(package.origin).parent / "vendor"


def _in_page(script: str) -> str:
    return script.replace("</script", "<\\/script")
