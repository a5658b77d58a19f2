"""Settings that are right by themselves and wrong together."""

from pathlib import Path

import pytest

from trainer import preset, schema
from trainer.errors import UserError

LEAST = {"model": {"family": "sd15", "base": "b"}, "data": {"folder": "d"}, "train": {"steps": 10}}


def told(**sections: dict) -> list[tuple[str, str]]:
    """What is said about a least preset with these settings."""
    merged = {name: LEAST.get(name, {}) | sections.get(name, {}) for name in {**LEAST, **sections}}
    found, problems = preset.check(merged)
    assert (found is None) == bool(problems)
    return [tuple(problem) for problem in problems]


FAULTS = {
    "no length": (
        {"train": {"steps": None}}, "train.steps", "is missing: give train.steps or train.epochs"),
    "two lengths": (
        {"train": {"epochs": 2}}, "train.epochs", "steps and epochs both given; keep one of them"),
    "a start of another method": (
        {"adapter": {"method": "stella", "init": "pissa"}}, "adapter.init",
        "'pissa' does not go with adapter.method = 'stella', which has 'default', 'random', 'zero', 'pseudo-zero', "
        "'svd-major', 'svd-minor'"),
    "a retraction without a manifold": (
        {"adapter": {"method": "lora", "retraction": "qr"}}, "adapter.retraction",
        "'qr' does not go with adapter.method = 'lora', which has 'default'"),
    "an optimizer of another method": (
        {"adapter": {"method": "stella"}, "train": {"optimizer": "stiefel"}}, "train.optimizer",
        "'stiefel' does not go with adapter.method = 'stella', which has 'auto', 'adamw', 'adamw8bit', 'sgd'"),
    "DoRA over trilora": (
        {"adapter": {"method": "trilora", "dora": True}}, "adapter.dora",
        "goes with lora, stiefel and stella, not with trilora; set it to false"),
    "an average that is not made": (
        {"output": {"weights": "ema"}}, "output.weights", "'ema' needs train.ema_decay above 0"),
    "a format of another family's files": (
        {"output": {"format": "F5"}}, "output.format",
        "'F5' is no format of sd15 files, which have 'auto', 'U1', 'U2'"),
    "a cover without a picture": (
        {"output": {"cover": True}}, "output.cover", "has no effect without sample.prompts; take it out"),
    "two held-out sets": (
        {"evaluate": {"folder": "h", "holdout": 0.1}}, "evaluate.holdout",
        "evaluate.folder already names the held-out images; keep one of them"),
    "early stop without validation": (
        {"evaluate": {"early_stop": 3, "every": 0}}, "evaluate.early_stop",
        "needs evaluate.every above 0 and held-out images: evaluate.folder or evaluate.holdout; set that, or this to "
        "0"),
    "early stop without held-out images": (
        {"evaluate": {"early_stop": 3}}, "evaluate.early_stop",
        "needs held-out images: evaluate.folder or evaluate.holdout; set that, or this to 0"),
    "variants of one crop": (
        {"data": {"crop_variants": 2}}, "data.crop_variants", "has no effect with data.crop = 'center'; take it out"),
    "variants of one caption": (
        {"data": {"caption_variants": 2}}, "data.caption_variants",
        "has no effect without data.shuffle_tags; take it out"),
    "first tags of no order": (
        {"data": {"keep_tags": 2}}, "data.keep_tags", "has no effect without data.shuffle_tags; take it out"),
    "weights of another extractor": (
        {"evaluate": {"folder": "h", "distance": "efflite0", "inception_weights": "w.pth"}},
        "evaluate.inception_weights", "has no effect with evaluate.distance = 'efflite0'; take it out"),
    "a weight outside of masks that are off": (
        {"data": {"masks": "off", "mask_background": 0.5}}, "data.mask_background",
        "has no effect with data.masks = 'off'; take it out"),
    "a share of no regularisation": (
        {"data": {"regularisation_share": 0.2}}, "data.regularisation_share",
        "has no effect without data.regularisation; take it out"),
    "a weight of no regularisation": (
        {"data": {"regularisation_weight": 0.5}}, "data.regularisation_weight",
        "has no effect without data.regularisation; take it out"),
    "delta without Huber": (
        {"train": {"huber_delta": 0.2}}, "train.huber_delta", "has no effect with train.loss = 'mse'; take it out"),
    "a diagonal without S": (
        {"adapter": {"method": "lora", "diagonal": True}}, "adapter.diagonal",
        "has no effect with adapter.method = 'lora'; take it out"),
    "gradient scaling off without a manifold": (
        {"adapter": {"method": "trilora", "gradient_scaling": False}}, "adapter.gradient_scaling",
        "has no effect with adapter.method = 'trilora'; take it out"),
    "d of another method": (
        {"adapter": {"method": "stiefel", "scale_dim": 320}}, "adapter.scale_dim",
        "has no effect with adapter.method = 'stiefel'; take it out"),
    "d without gradient scaling": (
        {"adapter": {"gradient_scaling": False, "scale_dim": 320}}, "adapter.scale_dim",
        "has no effect without adapter.gradient_scaling; take it out"),
    "a rank target without a diagonal": (
        {"adapter": {"rank_target": 4}}, "adapter.rank_target", "has no effect without adapter.diagonal; take it out"),
    "a rank target above the rank": (
        {"adapter": {"diagonal": True, "rank": 8, "rank_target": 8}}, "adapter.rank_target",
        "should be at least 1 and less than adapter.rank (8), not 8"),
    "a rank target below one": (
        {"adapter": {"diagonal": True, "rank_target": 0.5}}, "adapter.rank_target",
        "should be at least 1 and less than adapter.rank (16), not 0.5"),
    "a start beside a file": (
        {"adapter": {"start_from": "a.safetensors", "init": "zero"}}, "adapter.init",
        "has no effect with adapter.start_from; take it out"),
    "a rate of up without up": (
        {"train": {"up_lr_ratio": 16}}, "train.up_lr_ratio",
        "has no effect with adapter.method = 'stella'; take it out"),
    "betas of another optimizer": (
        {"adapter": {"method": "stiefel"}, "train": {"beta2": 0.99}}, "train.beta2",
        "has no effect with train.optimizer = 'stiefel'; take it out"),
    "momentum of another optimizer": (
        {"train": {"momentum": 0.9}}, "train.momentum", "has no effect with train.optimizer = 'adamw'; take it out"),
    "cautious without decay": (
        {"adapter": {"method": "stiefel"}, "train": {"cautious": True}}, "train.cautious",
        "has no effect without train.weight_decay; take it out"),
    "cautious in another optimizer": (
        {"train": {"cautious": True, "weight_decay": 0.1}}, "train.cautious",
        "has no effect with train.optimizer = 'adamw'; take it out"),
    "a gradient's weight in another optimizer": (
        {"adapter": {"method": "stiefel"}, "train": {"optimizer": "adamw", "gradient_weight": 5}},
        "train.gradient_weight", "has no effect with train.optimizer = 'adamw'; take it out"),
    "a warm-up without an end": (
        {"train": {"warmup_steps": 10}}, "train.warmup_steps",
        "should be less than train.steps (10), not 10: the learning rate would never be reached"),
    "a budget of a GPU on a CPU": (
        {"memory": {"device": "cpu", "budget_gb": 8}}, "memory.budget_gb",
        "has no effect with memory.device = 'cpu'; take it out"),
    "blocks offloaded from a CPU": (
        {"memory": {"device": "cpu", "offload_blocks": 2}}, "memory.offload_blocks",
        "has no effect with memory.device = 'cpu'; take it out"),
    "blocks offloaded and kept": (
        {"memory": {"gradient_checkpointing": "none", "offload_blocks": 2}}, "memory.offload_blocks",
        "needs memory.gradient_checkpointing = 'full' (or 'auto'): without it every block's weights stay on the GPU "
        "until the backward pass"),
    "blocks offloaded under DoRA": (
        {"adapter": {"dora": True}, "memory": {"offload_blocks": 2}}, "memory.offload_blocks",
        "does not go with adapter.dora, which reads all weights at each step; take one of them out"),
    "a model shared by GPUs and kept": (
        {"memory": {"gradient_checkpointing": "selective", "shard": "on"}}, "memory.shard",
        "'on' needs memory.gradient_checkpointing = 'full' (or 'auto'): without it every block's weights stay on the "
        "GPU until the backward pass"),
    "a model shared by GPUs and offloaded": (
        {"memory": {"offload_blocks": 2, "shard": "on"}}, "memory.shard",
        "'on' does not go with memory.offload_blocks: a block is kept by the other GPUs or by the computer; take one "
        "of them out"),
    "a path of Windows in double quotes": (
        {"model": {"base": "C:\bas"}}, "model.base",
        "'C:\\x08as' holds a character that no path has: in \"double quotes\" a \\ begins an escape, such as \\b or "
        "\\t. Write Windows paths in 'single quotes' or with /"),
    "such a path in a list": (
        {"data": {"folder": ["a", "C:\temp"]}}, "data.folder",
        "'C:\\temp' holds a character that no path has: in \"double quotes\" a \\ begins an escape, such as \\b or "
        "\\t. Write Windows paths in 'single quotes' or with /"),
    "a trained text encoder in few bits": (
        {"adapter": {"targets": ["text_encoder"]}, "memory": {"quantize_text_encoder": "nf4"}},
        "memory.quantize_text_encoder", "does not go with 'text_encoder' in adapter.targets, which trains it; "
        "take it out"),
}


@pytest.mark.parametrize("sections, where, text", FAULTS.values(), ids=FAULTS)
def test_what_does_not_go_together_is_told(sections, where, text):
    assert told(**sections) == [(where, text)]


GOOD = {
    "epochs instead of steps": {"train": {"steps": None, "epochs": 2}},
    "an average that is made": {"output": {"weights": "ema"}, "train": {"ema_decay": 0.99}},
    "a family's own format and a cover": {"output": {"format": "U2", "cover": True}, "sample": {"prompts": ["a"]}},
    "one held-out set": {"evaluate": {"folder": "h", "inception_weights": "w.pth"}},
    "early stop": {"evaluate": {"holdout": 0.1, "early_stop": 2}},
    "crops that vary": {"data": {"crop": "random", "crop_variants": 2}},
    "captions that vary": {"data": {"shuffle_tags": True, "caption_variants": 2}},
    "Huber with its delta": {"train": {"loss": "huber", "huber_delta": 0.2}},
    "DoRA over stella": {"adapter": {"method": "stella", "dora": True}},
    "a diagonal that shrinks": {"adapter": {"method": "stella", "diagonal": True, "rank_target": 4}},
    "a diagonal without the manifold": {"adapter": {"method": "trilora", "diagonal": True}},
    "gradient scaling off": {"adapter": {"gradient_scaling": False}},
    "a d of one's own": {"adapter": {"scale_dim": 320}},
    "a file to continue": {"adapter": {"start_from": "a.safetensors"}},
    "ScaledAdamW with LoRA+": {"adapter": {"method": "lora"},
                               "train": {"optimizer": "scaled_adamw", "up_lr_ratio": 4, "beta1": 0.8}},
    "every option of stiefel": {"adapter": {"method": "stiefel"}, "train": {
        "momentum": 0.9, "gradient_weight": 100, "weight_decay": 0.1, "cautious": True}},
    "a warm-up that ends": {"train": {"warmup_steps": 9}},
    "blocks offloaded": {"memory": {"offload_blocks": 2, "budget_gb": 8, "quantize_text_encoder": "nf4"}},
    "nothing offloaded from a CPU": {"memory": {"device": "cpu", "offload_blocks": 0}},
    "the momentum of sgd": {"train": {"optimizer": "sgd", "momentum": 0.5}},
}


@pytest.mark.parametrize("sections", GOOD.values(), ids=GOOD)
def test_what_goes_together_is_taken(sections):
    assert told(**sections) == []


@pytest.mark.parametrize("method", schema.METHOD_LR)
def test_each_method_takes_its_own_choices_and_no_others(method):
    for key, allowed in (("init", schema.METHOD_INITS), ("retraction", schema.METHOD_RETRACTIONS)):
        known = {choice for choices in allowed.values() for choice in choices}
        taken = {choice for choice in known if not told(adapter={"method": method, key: choice})}
        assert taken == set(allowed[method])
    known = {choice for choices in schema.METHOD_OPTIMIZERS.values() for choice in choices}
    taken = {choice for choice in known if not told(adapter={"method": method}, train={"optimizer": choice})}
    assert taken == set(schema.METHOD_OPTIMIZERS[method])


def test_faults_of_several_rules_and_of_single_settings_come_together():
    where = [place for place, _ in told(train={"epochs": 2, "huber_delta": 0.2}, output={"weights": "ema"},
                                        adapter={"method": "lora", "init": "zero"}, data={"resolution": 3})]
    assert where == ["data.resolution", "train.epochs", "adapter.init", "output.weights", "train.huber_delta"]


def test_a_faulty_section_is_not_blamed_twice():
    assert [place for place, _ in told(train={"steps": -1})] == ["train.steps"]


def test_a_rule_tells_the_line_of_the_setting_it_blames():
    text = ('[model]\nfamily = "sd15"\nbase = "b"\n[data]\nfolder = "d"\n[train]\nsteps = 1\noptimizer = "stiefel"\n'
            '[adapter]\nmethod = "lora"\n')
    with pytest.raises(UserError, match="^mine.toml:8: train.optimizer: 'stiefel' does not go with"):
        preset.parse(text, "mine.toml")


def test_settings_of_another_family_are_refused():
    where, text = told(model={"text_encoder_2": "/x"})[0]
    assert (where, text) == ("model.text_encoder_2", "has no effect with model.family = 'sd15'; take it out")
    assert told(model={"family": "sdxl", "text_encoder_2": "/x"}) == []


def test_a_target_pattern_must_be_a_regular_expression():
    (where, text), = told(adapter={"target_pattern": "attn("})
    assert where == "adapter.target_pattern" and text.startswith("is no regular expression: ")


@pytest.mark.parametrize(("family", "section", "key", "value", "said"), [
    ("flux1", "train", "snr_gamma", 5.0, "has no effect with model.family = 'flux1'; take it out"),
    ("sdxl", "train", "timestep_sampling", "uniform", "has no effect with model.family = 'sdxl'; take it out"),
    ("sd15", "adapter", "fuse_qkv", False, "has no effect with model.family = 'sd15'; take it out"),
    ("flux2", "adapter", "dora", True, "no file format holds it for flux2; set it to false"),
    ("flux2", "adapter", "targets", ["text_encoder"], "'text_encoder' is no group of flux2, which has 'attention', "
     "'feed_forward', 'single_blocks', 'all'"),
    ("sd15", "adapter", "targets", ["single_blocks"], "'single_blocks' is no group of sd15, which has 'attention', "
     "'feed_forward', 'projection', 'convolution', 'text_encoder', 'all'"),
    ("flux1", "data", "resolution", 1000, "must be a multiple of 16 for flux1, not 1000"),
    ("flux1", "model", "clip_skip", 2, "has no effect with model.family = 'flux1'; take it out"),
    ("flux1", "sample", "negative", "blurry", "has no effect with model.family = 'flux1', whose models are guided by "
     "one prompt only; take it out"),
    ("flux1", "train", "timestep_mean", 1.0, "has no effect with train.timestep_sampling = 'auto'; take it out"),
])
def test_what_a_family_does_not_have_is_refused(family, section, key, value, said):
    sections = {"model": {"family": family}}
    sections[section] = sections.get(section, {}) | {key: value}
    assert told(**sections) == [(f"{section}.{key}", said)]


def test_guidance_left_out_is_the_familys_own():
    for family, expected in schema.FAMILY_GUIDANCE.items():
        sections = {"model": {"family": family, "base": "b"}, "data": {"folder": "d"}, "train": {"steps": 10}}
        for given, guidance in (({}, expected), ({"guidance": 0.0}, 0.0)):
            checked, problems = preset.check(sections | {"sample": given})
            assert preset.complete(checked, Path("/")).sample.guidance == guidance, problems
