"""Settings that are right by themselves and wrong together."""

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
    "two held-out sets": (
        {"evaluate": {"folder": "h", "holdout": 0.1}}, "evaluate.holdout",
        "evaluate.folder already names the held-out images; keep one of them"),
    "variants of one crop": (
        {"data": {"crop_variants": 2}}, "data.crop_variants", "has no effect with data.crop = 'center'; take it out"),
    "variants of one caption": (
        {"data": {"caption_variants": 2}}, "data.caption_variants",
        "has no effect without data.shuffle_tags; take it out"),
    "delta without Huber": (
        {"train": {"huber_delta": 0.2}}, "train.huber_delta", "has no effect with train.loss = 'mse'; take it out"),
}


@pytest.mark.parametrize("sections, where, text", FAULTS.values(), ids=FAULTS)
def test_what_does_not_go_together_is_told(sections, where, text):
    assert told(**sections) == [(where, text)]


GOOD = {
    "epochs instead of steps": {"train": {"steps": None, "epochs": 2}},
    "an average that is made": {"output": {"weights": "ema"}, "train": {"ema_decay": 0.99}},
    "one held-out set": {"evaluate": {"folder": "h"}},
    "crops that vary": {"data": {"crop": "random", "crop_variants": 2}},
    "captions that vary": {"data": {"shuffle_tags": True, "caption_variants": 2}},
    "Huber with its delta": {"train": {"loss": "huber", "huber_delta": 0.2}},
    "DoRA over stella": {"adapter": {"method": "stella", "dora": True}},
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
