"""Colours, type and spacing of the app, with AA contrast in light and dark."""

from __future__ import annotations

import gradio as gr

SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def theme() -> gr.themes.Base:
    """Gradio's default with fonts of the machine (no network) and the contrasts that it lacks."""
    base = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=SANS, font_mono=MONO)
    return base.set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800", button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_dark="#b91c1c", block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )
