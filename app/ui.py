"""Puts the page together from its tabs."""

from __future__ import annotations

import gradio as gr

from app.components import Header
from app.jobs import Jobs
from app.tabs import preset, train

TITLE = "Stiefel Studio"
CACHE_CLEANING = (3600, 86400)  # seconds: look each hour, drop what is a day old


def build(jobs: Jobs) -> gr.Blocks:
    """The page.  It has no session state and no queued events: each open tab costs one small request a second."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=CACHE_CLEANING) as page:
        Header([])
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Train", id="train"):
                train.build(jobs)
            with gr.Tab("Preset", id="preset", render_children=True):
                preset.build(jobs)
    page.queue(default_concurrency_limit=8)
    return page
