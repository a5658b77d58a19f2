"""What single settings cannot say: which of them fit together.

Each rule sees the sections that are right in themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainer import schema
from trainer.schema import Problem


def _length_of_training(sections: Mapping[str, Any]) -> list[Problem]:
    train = sections.get("train")
    if train is None or (train.steps is None) != (train.epochs is None):
        return []
    if train.steps is None:
        return [Problem("train.steps", "is missing: give train.steps or train.epochs")]
    return [Problem("train.epochs", "steps and epochs both given; keep one of them")]


def _method_choices(sections: Mapping[str, Any]) -> list[Problem]:
    """init, retraction and optimizer must be the method's."""
    adapter, train = sections.get("adapter"), sections.get("train")
    if adapter is None:
        return []
    chosen = [("adapter.init", adapter.init, schema.METHOD_INITS[adapter.method]),
              ("adapter.retraction", adapter.retraction, schema.METHOD_RETRACTIONS[adapter.method])]
    if train is not None:
        chosen.append(("train.optimizer", train.optimizer, ("auto", *schema.METHOD_OPTIMIZERS[adapter.method])))
    return [Problem(where, f"{value!r} does not go with adapter.method = {adapter.method!r}, which has "
                    + ", ".join(repr(item) for item in allowed))
            for where, value, allowed in chosen if value not in allowed]


def _dora_methods(sections: Mapping[str, Any]) -> list[Problem]:
    adapter = sections.get("adapter")
    if adapter is None or not adapter.dora or adapter.method != "trilora":
        return []
    return [Problem("adapter.dora", "goes with lora, stiefel and stella, not with trilora; set it to false")]


def _weights_with_ema(sections: Mapping[str, Any]) -> list[Problem]:
    train, output = sections.get("train"), sections.get("output")
    if train is None or output is None or output.weights != "ema" or train.ema_decay > 0:
        return []
    return [Problem("output.weights", "'ema' needs train.ema_decay above 0")]


def _one_holdout(sections: Mapping[str, Any]) -> list[Problem]:
    evaluate = sections.get("evaluate")
    if evaluate is None or not evaluate.folder or evaluate.holdout == 0:
        return []
    return [Problem("evaluate.holdout", "evaluate.folder already names the held-out images; keep one of them")]


def _no_effect(sections: Mapping[str, Any]) -> list[Problem]:
    """Settings that would have no effect are faults, not silence."""
    data, train = sections.get("data"), sections.get("train")
    idle: list[tuple[str, Any, str]] = []
    if data is not None and data.crop == "center":
        idle.append(("data.crop_variants", data.crop_variants, "with data.crop = 'center'"))
    if data is not None and not data.shuffle_tags:
        idle.append(("data.caption_variants", data.caption_variants, "without data.shuffle_tags"))
    if train is not None and train.loss == "mse":
        idle.append(("train.huber_delta", train.huber_delta, "with train.loss = 'mse'"))
    return [Problem(where, f"has no effect {when}; take it out") for where, value, when in idle
            if value != schema.fields(where.split(".")[0])[where.split(".")[1]].default]


RULES: tuple[Callable[[Mapping[str, Any]], list[Problem]], ...] = (
    _length_of_training, _method_choices, _dora_methods, _weights_with_ema, _one_holdout,
    _no_effect,
)
