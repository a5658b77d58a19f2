"""Puts the page together from its tabs."""

from __future__ import annotations

import atexit

import gradio as gr

from app import components, theme
from app.components import Header
from app.datasets.library import Library
from app.jobs import Jobs
from app.tabs import compare, dataset, export, first_run, preset, train

TITLE = "Stiefel Studio"
USER = "studio"  # with a password there is one user
CACHE_CLEANING = (3600, 86400)  # seconds: look each hour, drop what is a day old


def build(jobs: Jobs) -> gr.Blocks:
    """The page.  It has no session state and no queued events: each open tab costs one small request a second."""
    library = Library(jobs.places)
    atexit.register(library.close)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=CACHE_CLEANING) as page:
        Header([])
        first_run.build(jobs, library)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Train", id="train"):
                train.build(jobs, library)
            with gr.Tab("Data set", id="dataset", render_children=True):
                dataset.build(library)
            with gr.Tab("Preset", id="preset", render_children=True):
                preset.build(jobs, library)
            with gr.Tab("Compare", id="compare", render_children=True):
                compare.build(jobs)
            with gr.Tab("Export", id="export", render_children=True):
                export.build(jobs.places)
    page.queue(default_concurrency_limit=8)
    return page


def launch(jobs: Jobs, *, host: str, port: int | None, password: str | None = None, share: bool = False,
           open_browser: bool = False) -> tuple[gr.Blocks, str, str | None]:
    """Serve the page and return at once: the page, its local address, and the public one if there is one."""
    page = build(jobs)
    _, local, public = page.launch(
        server_name=host, server_port=port, share=share, inbrowser=open_browser,
        auth=(USER, password) if password else None, theme=theme.theme(), head=components.head(),
        footer_links=[], quiet=True, prevent_thread_lock=True, ssr_mode=False)
    page.allowed_paths = jobs.places.handed_out  # this very list, which grows as runs are looked at
    return page, local, public
