"""What single settings cannot say: which of them fit together.

Each rule sees the sections that are right in themselves.
"""

from __future__ import annotations

import re
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


def _early_stop(sections: Mapping[str, Any]) -> list[Problem]:
    """What an early stop is decided by."""
    evaluate = sections.get("evaluate")
    if evaluate is None or evaluate.early_stop == 0:
        return []
    missing = [] if evaluate.every else ["evaluate.every above 0"]
    missing += [] if evaluate.folder or evaluate.holdout else ["held-out images: evaluate.folder or evaluate.holdout"]
    return [Problem("evaluate.early_stop", f"needs {' and '.join(missing)}; set that, or this to 0")] if missing else []


def _rank_target(sections: Mapping[str, Any]) -> list[Problem]:
    adapter = sections.get("adapter")
    if adapter is None or not adapter.rank_target or 1 <= adapter.rank_target < adapter.rank:
        return []
    return [Problem("adapter.rank_target", f"should be at least 1 and less than adapter.rank ({adapter.rank}), "
                    f"not {adapter.rank_target:g}")]


def _no_effect(sections: Mapping[str, Any]) -> list[Problem]:
    """Settings that would have no effect are faults, not silence."""
    data, train, adapter = sections.get("data"), sections.get("train"), sections.get("adapter")
    idle: list[tuple[str, str]] = []  # setting, when it has none
    if data is not None and data.crop == "center":
        idle.append(("data.crop_variants", "with data.crop = 'center'"))
    if data is not None and not data.shuffle_tags:
        idle += [(f"data.{key}", "without data.shuffle_tags") for key in ("caption_variants", "keep_tags")]
    if data is not None and data.masks == "off":
        idle.append(("data.mask_background", "with data.masks = 'off'"))
    if data is not None and not data.regularisation:
        idle += [("data.regularisation_share", "without data.regularisation"),
                 ("data.regularisation_weight", "without data.regularisation")]
    if train is not None and train.loss == "mse":
        idle.append(("train.huber_delta", "with train.loss = 'mse'"))
    if (evaluate := sections.get("evaluate")) is not None and evaluate.distance == "efflite0":
        idle.append(("evaluate.inception_weights", "with evaluate.distance = 'efflite0'"))
    if adapter is not None:
        idle += _idle_in_method(adapter)
    if adapter is not None and train is not None:
        idle += _idle_in_optimizer(adapter, train)
    problems = []
    for where, when in dict(idle).items():
        section, key = where.split(".")
        if getattr(sections[section], key) != schema.fields(section)[key].default:
            problems.append(Problem(where, f"has no effect {when}; take it out"))
    return problems


def _idle_in_method(adapter: schema.Adapter) -> list[tuple[str, str]]:
    idle, method = [], f"with adapter.method = {adapter.method!r}"
    if not adapter.diagonal:
        idle.append(("adapter.rank_target", "without adapter.diagonal"))
    if not adapter.gradient_scaling:
        idle.append(("adapter.scale_dim", "without adapter.gradient_scaling"))
    if adapter.start_from:
        idle.append(("adapter.init", "with adapter.start_from"))
    if adapter.method not in ("stella", "trilora"):
        idle.append(("adapter.diagonal", method))
    if adapter.method != "stella":
        idle += [("adapter.gradient_scaling", method), ("adapter.scale_dim", method)]
    return idle


def _idle_in_optimizer(adapter: schema.Adapter, train: schema.Train) -> list[tuple[str, str]]:
    optimizer = schema.METHOD_OPTIMIZER[adapter.method] if train.optimizer == "auto" else train.optimizer
    idle, with_it = [], f"with train.optimizer = {optimizer!r}"
    if adapter.method != "lora":
        idle.append(("train.up_lr_ratio", f"with adapter.method = {adapter.method!r}"))
    if "adamw" not in optimizer:
        idle += [("train.beta1", with_it), ("train.beta2", with_it)]
    if optimizer not in ("sgd", "stiefel"):
        idle.append(("train.momentum", with_it))
    if train.weight_decay == 0:
        idle.append(("train.cautious", "without train.weight_decay"))
    if optimizer != "stiefel":
        idle += [("train.cautious", with_it), ("train.gradient_weight", with_it)]
    return idle


def _family_model(sections: Mapping[str, Any]) -> list[Problem]:
    """Settings of the base model that its family does not have."""
    model = sections.get("model")
    if model is None:
        return []
    known = {"family", "base", *schema.FAMILY_MODEL[model.family]}
    return [Problem(f"model.{key}", f"has no effect with model.family = {model.family!r}; take it out")
            for key, field in schema.fields("model").items()
            if key not in known and getattr(model, key) != field.default]


def _family_adapter(sections: Mapping[str, Any]) -> list[Problem]:
    """Layers and forms of adapter that a family does not have."""
    model, adapter = sections.get("model"), sections.get("adapter")
    if model is None or adapter is None:
        return []
    flow = model.family in schema.FLOW_FAMILIES
    allowed = schema.FLOW_TARGETS if flow else schema.UNET_TARGETS
    found = [Problem("adapter.targets", f"{group!r} is no group of {model.family}, which has "
                     + ", ".join(repr(item) for item in allowed))
             for group in adapter.targets if group not in allowed]
    if flow and adapter.dora:
        found.append(Problem("adapter.dora", f"no file format holds it for {model.family}; set it to false"))
    if not flow and not adapter.fuse_qkv:
        found.append(Problem("adapter.fuse_qkv", f"has no effect with model.family = {model.family!r}; take it out"))
    return found


def _family_output(sections: Mapping[str, Any]) -> list[Problem]:
    """A format of another family's files, and a cover without a picture to take."""
    model, output, sample = sections.get("model"), sections.get("output"), sections.get("sample")
    found = []
    if model is not None and output is not None:
        allowed = schema.FAMILY_FORMATS[model.family]
        if output.format not in ("auto", *allowed):
            found.append(Problem("output.format", f"{output.format!r} is no format of {model.family} files, which have "
                                 + ", ".join(repr(item) for item in ("auto", *allowed))))
    if output is not None and output.cover and sample is not None and not sample.prompts:
        found.append(Problem("output.cover", "has no effect without sample.prompts; take it out"))
    return found


def _family_training(sections: Mapping[str, Any]) -> list[Problem]:
    """Timesteps and loss weights that a family's objective does not know, and sides that its grid does not fit."""
    model, train, sample = sections.get("model"), sections.get("train"), sections.get("sample")
    if model is None:
        return []
    flow = model.family in schema.FLOW_FAMILIES
    idle = ["snr_gamma"] if flow else ["timestep_sampling", "timestep_mean", "timestep_scale", "timestep_shift"]
    found = [Problem(f"train.{key}", f"has no effect with model.family = {model.family!r}; take it out")
             for key in idle if train is not None and getattr(train, key) != schema.fields("train")[key].default]
    sides = [("data", "resolution"), ("sample", "width"), ("sample", "height")]
    found += [Problem(f"{section}.{key}", f"must be a multiple of {schema.FLOW_GRID} for {model.family}, not {side}")
              for section, key in sides if flow and sections.get(section) is not None
              and (side := getattr(sections[section], key)) % schema.FLOW_GRID]
    if flow and train is not None:
        found += _idle_sampling(train)
    if model.family == "flux1" and sample is not None and sample.negative:
        found.append(Problem("sample.negative", "has no effect with model.family = 'flux1', whose models are guided by "
                             "one prompt only; take it out"))
    return found


def _idle_sampling(train: Any) -> list[Problem]:  # noqa: ANN401
    """Settings of the timesteps' distribution that the chosen one does not have."""
    chosen = train.timestep_sampling
    idle = [("timestep_mean", train.timestep_mean != 0.0 and chosen != "logit_normal"),
            ("timestep_scale", train.timestep_scale != 1.0 and chosen == "uniform")]
    return [Problem(f"train.{key}", f"has no effect with train.timestep_sampling = {chosen!r}; take it out")
            for key, fault in idle if fault]


def _paths(sections: Mapping[str, Any]) -> list[Problem]:
    """Paths of Windows in "double quotes", where \\b and \\t stand for a backspace and a tab."""
    return [Problem(f"{name}.{key}", f"{path!r} holds a character that no path has: in \"double quotes\" a \\ begins "
                    "an escape, such as \\b or \\t. Write Windows paths in 'single quotes' or with /")
            for name, section in sections.items() for key in type(section).model_fields if schema.has_path(name, key)
            for value in [getattr(section, key)] for path in ([value] if isinstance(value, str) else value)
            if any(ord(character) < 32 for character in path)]


def _warm_up(sections: Mapping[str, Any]) -> list[Problem]:
    """A warm-up as long as the training would never reach the learning rate."""
    train = sections.get("train")
    if train is None or train.steps is None or train.warmup_steps < train.steps:
        return []
    return [Problem("train.warmup_steps", f"should be less than train.steps ({train.steps}), not "
                    f"{train.warmup_steps}: the learning rate would never be reached")]


def _memory(sections: Mapping[str, Any]) -> list[Problem]:
    """Ways to save memory that the device does not have, or that need one another."""
    memory, adapter = sections.get("memory"), sections.get("adapter")
    if memory is None:
        return []
    found = []
    if memory.device == "cpu":
        found += [Problem(f"memory.{key}", "has no effect with memory.device = 'cpu'; take it out")
                  for key, given in (("budget_gb", memory.budget_gb > 0), ("offload_blocks", memory.offload_blocks > 0))
                  if given]
    if memory.offload_blocks > 0 and adapter is not None and adapter.dora:
        found.append(Problem("memory.offload_blocks", "does not go with adapter.dora, which reads all weights at each "
                             "step; take one of them out"))
    if memory.offload_blocks > 0 and memory.gradient_checkpointing not in ("auto", "full"):
        found.append(Problem("memory.offload_blocks", "needs memory.gradient_checkpointing = 'full' (or 'auto'): "
                             "without it every block's weights stay on the GPU until the backward pass"))
    if memory.shard == "on" and memory.gradient_checkpointing not in ("auto", "full"):
        found.append(Problem("memory.shard", "'on' needs memory.gradient_checkpointing = 'full' (or 'auto'): without "
                             "it every block's weights stay on the GPU until the backward pass"))
    if memory.shard == "on" and memory.offload_blocks > 0:
        found.append(Problem("memory.shard", "'on' does not go with memory.offload_blocks: a block is kept by the "
                             "other GPUs or by the computer; take one of them out"))
    if (adapter is not None and "text_encoder" in adapter.targets
            and memory.quantize_text_encoder not in ("auto", "none")):
        found.append(Problem("memory.quantize_text_encoder", "does not go with 'text_encoder' in adapter.targets, "
                             "which trains it; take it out"))
    return found


def _fast(sections: Mapping[str, Any]) -> list[Problem]:
    """What keeps steps from becoming CUDA graphs, or blocks from being compiled, where that is asked for."""
    memory, adapter, train = sections.get("memory"), sections.get("adapter"), sections.get("train")
    if memory is None or adapter is None or train is None:
        return []
    compiled = [("memory.device = 'cpu'", memory.device == "cpu"), ("memory.offload_blocks", memory.offload_blocks > 0),
                ("adapter.dropout", adapter.dropout > 0), ("memory.shard = 'on'", memory.shard == "on")]
    graphs = [*compiled, ("'text_encoder' in adapter.targets", "text_encoder" in adapter.targets)]
    wanted = [("memory.cuda_graphs", memory.cuda_graphs, graphs), ("train.compile", train.compile, compiled)]
    return [Problem(where, f"'on' does not go with {what}; set it to 'auto'")
            for where, chosen, against in wanted if chosen == "on" for what, given in against if given]


def _matmul(sections: Mapping[str, Any]) -> list[Problem]:
    """What keeps frozen layers from multiplying in 8 bits where that is asked for."""
    memory, train = sections.get("memory"), sections.get("train")
    if memory is None or train is None or train.matmul in ("auto", "off"):
        return []
    against = [("memory.device = 'cpu'", memory.device == "cpu"), ("memory.offload_blocks", memory.offload_blocks > 0),
               ("memory.shard = 'on'", memory.shard == "on"),
               (f"memory.quantize = {memory.quantize!r}", memory.quantize not in ("auto", "none", train.matmul))]
    return [Problem("train.matmul", f"{train.matmul!r} does not go with {what}; set it to 'auto'")
            for what, given in against if given]


def _target_pattern(sections: Mapping[str, Any]) -> list[Problem]:
    adapter = sections.get("adapter")
    try:
        re.compile(adapter.target_pattern if adapter is not None else "")
    except re.error as error:
        return [Problem("adapter.target_pattern", f"is no regular expression: {error}")]
    return []


RULES: tuple[Callable[[Mapping[str, Any]], list[Problem]], ...] = (
    _family_model, _family_adapter, _family_output, _family_training, _target_pattern, _paths, _warm_up, _memory,
    _fast, _matmul, _length_of_training, _method_choices, _dora_methods, _rank_target,
    _weights_with_ema, _one_holdout, _early_stop, _no_effect,
)
