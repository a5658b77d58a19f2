"""Changes what a run draws while it trains, when somebody asks for it: from now on, and after a resume too."""

from __future__ import annotations

import json

from trainer import preset as presets
from trainer.errors import UserError
from trainer.session import Session

MOST = 50  # prompts: each costs a picture at every sample
LONGEST = 2000  # characters of one


def change(session: Session, wish: str) -> None:
    """Take over the prompts of a request, a JSON list of texts; the next samples draw them.

    They are encoded first, so that a failure leaves the old ones.  Raises `UserError` for a list that is none.
    """
    prompts = parse(wish)
    session.world.together(lambda: session.encode_new(prompts))
    file = session.run.preset
    if session.world.first:
        presets.save(file, presets.update_text(presets.read_text(file), {"sample": {"prompts": prompts}}))
    sample = session.preset.sample.model_copy(update={"prompts": prompts})
    session.preset = session.preset.model_copy(update={"sample": sample})
    session.recorder.event("prompts", step=session.progress.step, prompts=prompts)


def parse(wish: str) -> list[str]:
    """The prompts of a request; empty ones are left out."""
    try:
        prompts = json.loads(wish)
    except ValueError:
        prompts = None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError('control/prompts: write a JSON list of texts, such as ["a red cat", "a blue dog"]')
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if len(prompts) > MOST or any(len(prompt) > LONGEST for prompt in prompts):
        raise UserError(f"control/prompts: give at most {MOST} prompts of at most {LONGEST} characters")
    return prompts
