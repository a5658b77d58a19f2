"""Presets: what is said about a faulty one, and what stays of a good one."""

import re
from pathlib import Path

import pytest
import tomlkit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer import preset, schema
from trainer.errors import UserError

GOOD = """\
[model]
family = "sd15"
base = "owner/base"

[data]
folder = "photos"

[train]
steps = 10
"""
COMMENTED = """\
# python -m trainer --preset mine.toml

[model]
family = 'sd15'   # the kind
base = "owner/base"

[train]           # a section's comment
steps = 1_000
lr = 1e-4         # spelt by hand
weight_decay = 0.10

# about the data
[data]
folder = [
    "a",  # the first
    "b",
]
flip = false
"""
ALPHA = ("; leave it out (the scale alpha/rank would change what the learning rate means, and both manifold methods "
         "need scale 1)")


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        preset.parse(text, "mine.toml", overrides)
    return str(caught.value)


def put(section: str, line: str) -> str:
    """GOOD with one more line in a section; a section that GOOD lacks comes after it, at line 10."""
    if f"[{section}]" in GOOD:
        return GOOD.replace(f"[{section}]\n", f"[{section}]\n{line}\n")
    return f"{GOOD}[{section}]\n{line}\n"


# In each row one thing is wrong with a good preset, and the whole message follows.
FAULTS = {
    "typo in a section": (put("trian", "lr = 1.0"), "mine.toml:10: trian: no such section. Did you mean train?"),
    "unknown section": (put("zzz", "lr = 1.0"), "mine.toml:10: zzz: no such section."),
    "typo in a key": (
        put("train", "grad_acum = 2"), "mine.toml:9: train.grad_acum: no such key. Did you mean grad_accum?"),
    "unknown key": (put("data", "xyzzy = 2"), "mine.toml:6: data.xyzzy: no such key."),
    "key outside of a section": (
        "steps = 5\n" + GOOD, "mine.toml:1: steps: stands outside of a section; write it as section.key"),
    "text for a number": (
        put("train", 'batch_size = "two"'),
        "mine.toml:9: train.batch_size: should be a whole number, not 'two'."),
    "fraction for a whole number": (
        put("train", "batch_size = 1.5"),
        "mine.toml:9: train.batch_size: should be a whole number, not 1.5."),
    "switch for a number": (
        put("train", "batch_size = true"), "mine.toml:9: train.batch_size: should not be true or false"),
    "switch for a rate": (put("train", "lr = true"), "mine.toml:9: train.lr: should not be true or false"),
    "switch for a rank": (put("adapter", "rank = true"), "mine.toml:11: adapter.rank: should not be true or false"),
    "number for a text": (put("output", "title = 5"), "mine.toml:11: output.title: should be a text in quotes, not 5."),
    "number for a folder": (
        GOOD.replace('"photos"', "3"), "mine.toml:6: data.folder: should be a text in quotes, not 3."),
    "wrong item of a list": (
        GOOD.replace('"photos"', '["a", 3]'),
        "mine.toml:6: data.folder: should be a text in quotes (item 2), not 3."),
    "no folder at all": (
        GOOD.replace('"photos"', "[]"), "mine.toml:6: data.folder: should have at least 1 item, not []."),
    "empty text": (
        GOOD.replace('"photos"', '""'), "mine.toml:6: data.folder: should have at least 1 character, not ''."),
    "text for a list": (
        put("sample", 'prompts = "a cat"'), "mine.toml:11: sample.prompts: should be a list in brackets, not 'a cat'."),
    "not one of the words": (
        put("adapter", 'method = "stela"'),
        "mine.toml:11: adapter.method: should be 'lora', 'stiefel', 'stella' or 'trilora', not 'stela'. "
        "Did you mean stella?"),
    "not one of the words, in a list": (
        put("adapter", 'targets = ["attention", "atention"]'),
        "mine.toml:11: adapter.targets: should be 'attention', 'feed_forward', 'projection', 'convolution', "
        "'single_blocks', 'text_encoder' or 'all' (item 2), not 'atention'. Did you mean attention?"),
    "below the range": (
        put("train", "lr = -1e-4"), "mine.toml:9: train.lr: should be greater than 0, not -0.0001."),
    "above the range": (
        put("adapter", "rank = 513"), "mine.toml:11: adapter.rank: should be less than or equal to 512, not 513."),
    "not finite": (put("train", "lr = nan"), "mine.toml:9: train.lr: should be a finite number, not nan."),
    "not a multiple": (
        put("data", "resolution = 500"), "mine.toml:6: data.resolution: should be a multiple of 8, not 500."),
    "rate of an unknown method": (
        put("train", "lr = { stela = 1e-4 }"),
        "mine.toml:9: train.lr: should be 'lora', 'stiefel', 'stella' or 'trilora', not 'stela'. Did you mean stella?"),
    "missing, with what it is": (
        GOOD.replace('base = "owner/base"\n', ""),
        "mine.toml:1: model.base: is missing. The base model: a diffusers folder, a single .safetensors file, or a "
        "hub id."),
    "no length": (
        GOOD.replace("steps = 10", ""), "mine.toml:8: train.steps: is missing: give train.steps or train.epochs"),
    "two lengths": (
        put("train", "epochs = 2"), "mine.toml:9: train.epochs: steps and epochs both given; keep one of them"),
    "alpha is not rank": (
        put("adapter", "rank = 8\nalpha = 16"),
        "mine.toml:12: adapter.alpha: alpha must equal rank (8), not 16" + ALPHA),
    "alpha is not the default rank": (
        put("adapter", "alpha = 1"), "mine.toml:11: adapter.alpha: alpha must equal rank (16), not 1" + ALPHA),
    "alpha is a word": (
        put("adapter", 'alpha = "rank"'),
        "mine.toml:11: adapter.alpha: alpha must equal rank (16), not 'rank'" + ALPHA),
    "later version": (
        "version = 99\n" + GOOD, "mine.toml:1: version: this preset has version 99, and this program knows 1 to 2; "
        "update the program, or take the line out"),
    "broken TOML": ('[train]\nsteps 3\n', "mine.toml:2: not valid TOML: Expected '=' after a key in a key/value pair"),
    "broken TOML at the end": ('[train]\nlr = "x', "mine.toml:2: not valid TOML: Unterminated string"),
}


@pytest.mark.parametrize("text, message", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told_with_its_place_and_a_way_out(text, message):
    assert refusal(text) == message


OVERRIDES = {
    "wrong type": ("train.lr=high", "should be a number, not 'high'."),
    "as it was typed": ("train.lr={lora=-1}", "should be greater than 0, not -1."),
    "alpha": ("adapter.alpha=8", "alpha must equal rank (16), not 8" + ALPHA),
    "typo in the key": ("train.step=3", "no such key. Did you mean steps?"),
    "typo in the section": ("trian.steps=3", "no such section. Did you mean train?"),
    **{f"malformed {item}": (item, "write it as section.key=value, for example --set train.lr=1e-4")
       for item in ("train.lr", "lr=1", "a.b.c=1", ".lr=1", "train.=1", "=", "")},
}


@pytest.mark.parametrize("item, message", OVERRIDES.values(), ids=OVERRIDES)
def test_a_fault_of_an_override_names_the_override(item, message):
    assert refusal(GOOD, item) == f"--set {item}: {message}"


def test_a_section_that_the_file_has_is_told_by_its_line():
    assert refusal(put("trian", "lr = 1.0"), "trian.lr=2") == \
        "mine.toml:10: trian: no such section. Did you mean train?"


def test_all_faults_come_at_once_in_the_order_of_the_schema():
    text = GOOD.replace("base", "bsae", 1).replace("steps = 10", "steps = 0\nepochs = 0") + "[adapter]\nalpha = 3\n"
    lines = refusal(text, "log.every=never").splitlines()
    assert [line.split(": ")[:2] for line in lines[:-1]] == [
        ["mine.toml:1", "model.base"], ["mine.toml:3", "model.bsae"], ["mine.toml:12", "adapter.alpha"],
        ["mine.toml:9", "train.steps"], ["mine.toml:10", "train.epochs"]]
    assert lines[-1].startswith("--set log.every=never: ")


def test_an_empty_preset_names_everything_it_needs():
    assert re.findall(r"^mine\.toml: ([\w.]+): is missing", refusal(""), re.M) == [
        "model.family", "model.base", "data.folder", "train.steps"]


def test_overrides_beat_the_file_and_the_last_one_counts():
    overrides = ["train.steps=20", "train.steps=30", "data.folder=C:\\my photos", 'sample.prompts=["a", "b"]',
                 "train.lr = 1e-5", "data.flip=true", "output.title=", "data.trigger=a=b"]
    got = preset.parse(GOOD, "mine.toml", overrides)
    assert (got.train.steps, got.train.lr, got.data.folder) == (30, 1e-5, "C:\\my photos")
    assert (got.sample.prompts, got.data.flip, got.output.title, got.data.trigger) == (["a", "b"], True, "", "a=b")


def test_an_override_mends_a_faulty_file():
    assert preset.parse(put("train", "batch_size = 0"), "mine.toml", ["train.batch_size=4"]).train.batch_size == 4


def test_alpha_follows_rank_and_may_be_said_rightly():
    assert preset.parse(put("adapter", "rank = 8"), "p").adapter.alpha == 8
    assert preset.parse(put("adapter", "rank = 8\nalpha = 8"), "p").adapter.alpha == 8
    assert preset.parse(GOOD, "p", ["adapter.rank=4"]).adapter.alpha == 4


@pytest.mark.parametrize("make, message", [
    (lambda path: path.write_bytes(b'[data]\nfolder = "Caf\xe9"\n'), "not UTF-8 text (byte 20); save it as UTF-8"),
    (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    (lambda path: None, "cannot be read: No such file or directory"),
], ids=["Latin-1", "a folder", "not there"])
def test_a_file_that_cannot_be_read_is_told_plainly(tmp_path, make, message):
    path = tmp_path / "mine.toml"
    make(path)
    with pytest.raises(UserError) as caught:
        preset.load(path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_byte_order_mark_is_no_fault_and_windows_line_ends_stay(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert preset.load(path).train.steps == 10
    assert preset.update_text(preset.read_text(path), {"train": {"steps": 11}}) == \
        GOOD.replace("\n", "\r\n").replace("10", "11")


def test_a_preset_survives_being_written_and_read():
    text = put("train", "lr = { lora = 1e-4, stella = 0.1 }")
    text += '[sample]\nprompts = ["a \\"quoted\\" cat", "日本\\n"]\n'
    for given_preset in (preset.parse(text, "p"), preset.complete(preset.parse(text, "p"), Path("/"))):
        assert preset.parse(preset.dumps(given_preset), "p") == given_preset


def test_a_written_preset_says_every_value():
    written = tomlkit.parse(preset.dumps(preset.complete(preset.parse(GOOD, "p"), Path("/")))).unwrap()
    silent = {(name, key) for name in schema.SECTIONS for key in schema.fields(name) if key not in written[name]}
    assert silent == {("train", "epochs"), ("train", "momentum")}  # AdamW has none


@pytest.mark.parametrize("version", ["version = 1\n", ""])
@pytest.mark.parametrize("old, new", [("true", "full"), ("false", "none"), ('"auto"', "auto")])
def test_an_older_preset_is_brought_up_to_date(version, old, new):
    got = preset.parse(version + put("memory", f"gradient_checkpointing = {old}"), "old.toml")
    assert (got.memory.gradient_checkpointing, got.version) == (new, schema.SCHEMA_VERSION)
    assert preset.parse(preset.dumps(got), "new.toml") == got


def test_the_present_version_is_not_migrated():
    assert refusal("version = 2\n" + put("memory", "gradient_checkpointing = true")) == (
        "mine.toml:12: memory.gradient_checkpointing: should be 'auto', 'none', 'selective' or 'full', not True.")


def test_equal_values_change_no_byte():
    values = tomlkit.parse(COMMENTED).unwrap()
    assert preset.update_text(COMMENTED, values) == COMMENTED


def test_only_what_differs_changes():
    got = preset.update_text(COMMENTED, {"train": {"lr": 3e-4, "steps": 1000}, "data": {"flip": True}})
    assert got == COMMENTED.replace("1e-4 ", "0.0003 ", 1).replace("flip = false", "flip = true")


def test_a_number_and_a_switch_are_not_the_same():
    assert preset.update_text("[a]\nx = 1\ny = true\n", {"a": {"x": True, "y": 1}}) == "[a]\nx = true\ny = 1\n"


def test_none_takes_a_key_out_and_nothing_else():
    assert preset.update_text(COMMENTED, {"train": {"weight_decay": None}, "log": {"every": None}}) == \
        COMMENTED.replace("weight_decay = 0.10\n", "")


@pytest.mark.parametrize("text", [COMMENTED, GOOD, GOOD.rstrip()], ids=["commented", "plain", "no newline at the end"])
def test_new_keys_and_sections_leave_the_old_lines_as_they_are(text):
    got = preset.update_text(text, {"train": {"seed": 7}, "log": {"every": 5}})
    assert [line for line in got.splitlines() if line in text.splitlines() and line] == [
        line for line in text.splitlines() if line]
    parsed = preset.parse(got, "p")
    assert (parsed.train.seed, parsed.log.every) == (7, 5)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(lr=st.floats(1e-8, 9.0), steps=st.integers(1, 10**7), trigger=TEXTS, prompts=st.lists(TEXTS, max_size=3),
       flip=st.booleans())
def test_any_values_can_be_put_in_and_read_back(lr, steps, trigger, prompts, flip):
    got = preset.update_text(COMMENTED, {"train": {"lr": lr, "steps": steps},
                                         "data": {"trigger": trigger, "flip": flip}, "sample": {"prompts": prompts}})
    parsed = preset.parse(got, "p")
    assert (parsed.train.lr, parsed.train.steps, parsed.data.flip) == (lr, steps, flip)
    assert (parsed.data.trigger, parsed.sample.prompts) == (trigger, prompts)
    untouched = [line for line in COMMENTED.splitlines() if line and not re.match("lr|steps|flip", line)]
    assert [line for line in got.splitlines() if line in untouched] == untouched


def test_a_faulty_text_is_not_saved(tmp_path):
    path = tmp_path / "mine.toml"
    preset.save(path, COMMENTED)
    with pytest.raises(UserError, match="mine.toml:8: train.steps"):
        preset.save(path, COMMENTED.replace("1_000", "0"))
    assert path.read_bytes() == COMMENTED.encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_preset_is_found_as_given_then_shipped_then_in_the_workspace(tmp_path, monkeypatch):
    here, shipped, workspace = (tmp_path / name for name in ("here", "shipped", "workspace"))
    monkeypatch.setattr(preset, "SHIPPED", shipped)
    for folder in (here, shipped, workspace / "presets"):
        folder.mkdir(parents=True)
        (folder / "mine.toml").write_text(GOOD)
    (shipped / "mine").mkdir()  # a folder of that name, as demo/ beside demo.toml, is passed over
    monkeypatch.chdir(here)
    for folder in (here, shipped, workspace / "presets"):
        for name in ("mine", "mine.toml", str(folder / "mine.toml")):
            assert preset.find(name, workspace) == folder / "mine.toml"
        (folder / "mine.toml").unlink()


def test_a_preset_that_is_not_there_is_told_with_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(preset, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        preset.find("flux_kline.toml", tmp_path)
    where = f"no preset 'flux_kline.toml': not a file here, nor in {tmp_path / 'shipped'} or {tmp_path / 'presets'}."
    assert str(caught.value) == where
    for name in ("flux_klein", "sd15_stella"):
        (tmp_path / "presets").mkdir(exist_ok=True)
        (tmp_path / "presets" / f"{name}.toml").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        preset.find("flux_kline.toml", tmp_path)
    assert str(caught.value) == where + " Did you mean flux_klein? There are: flux_klein, sd15_stella."


@pytest.mark.parametrize("method", schema.METHOD_LR)
def test_what_is_left_out_is_the_methods_own(tmp_path, method):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    train = preset.load(path, [f"adapter.method={method}"]).train
    assert (train.optimizer, train.lr) == (schema.METHOD_OPTIMIZER[method], schema.METHOD_LR[method])
    assert train.momentum == (0.95 if method == "stiefel" else None)


def test_a_table_of_rates_gives_each_method_its_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(put("train", "lr = { lora = 3e-5, stella = 2e-4 }"))
    rates = {method: preset.load(path, [f"adapter.method={method}"]).train.lr for method in schema.METHOD_LR}
    assert rates == {"lora": 3e-5, "stella": 2e-4, "stiefel": schema.METHOD_LR["stiefel"],
                     "trilora": schema.METHOD_LR["trilora"]}
    assert preset.load(path, ["train.lr=5e-5"]).train.lr == 5e-5


def test_paths_become_absolute_against_the_presets_folder_then_the_working_directory(tmp_path, monkeypatch):
    for folder in ("presets/demo", "presets/both", "both", "here", "owner/found"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "presets" / "mine.toml").write_text(GOOD)
    got = preset.load(Path("presets/mine.toml"), ['data.folder=["demo", "both", "here", "nowhere", "~/here"]'])
    completed = ("presets/demo", "presets/both", "here", "nowhere", "here")
    assert got.data.folder == [str(tmp_path / name) for name in completed]
    assert got.evaluate.folder == ""


@pytest.mark.parametrize("base, completed", [
    ("owner/model-1.5", "owner/model-1.5"),  # nothing of that name here: a hub id
    ("owner/found", "{here}/owner/found"),
    ("./owner", "{here}/owner"),
    ("./not_there", "{here}/not_there"),
    ("../not_there", "{here}/../not_there"),
    ("file.safetensors", "{here}/file.safetensors"),
    ("a/b/c", "{here}/a/b/c"),
    ("/absolute", "/absolute"),
])
def test_a_base_is_a_hub_id_only_when_it_looks_like_one_and_is_no_path(tmp_path, monkeypatch, base, completed):
    (tmp_path / "owner" / "found").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    got = preset.complete(preset.parse(GOOD, "p", [f"model.base={base}"]), tmp_path / "presets")
    assert got.model.base == completed.format(here=tmp_path)


def test_a_resume_may_change_only_what_lies_ahead():
    before = preset.parse(GOOD, "p")
    ahead = ["train.steps=99", "sample.every=3", "evaluate.images=2", "log.every=7"]
    preset.check_resume(before, preset.parse(GOOD, "p", ahead))
    with pytest.raises(UserError) as caught:
        preset.check_resume(before, preset.parse(
            GOOD, "p", [*ahead, "adapter.rank=4", "train.seed=1", "output.keep=9"]))
    assert str(caught.value) == (
        "a resume may change only train.steps, sample, evaluate and log, not adapter.rank, adapter.alpha, train.seed, "
        "output.keep; start a new run with the changed preset instead")


@pytest.mark.parametrize("override, steps, epochs", [("train.epochs=3", None, 3), ("train.steps=7", 7, None)])
def test_an_override_of_the_length_replaces_the_other_length(override, steps, epochs):
    text = GOOD if epochs else GOOD.replace("steps = 10", "epochs = 2")
    train = preset.parse(text, "mine.toml", [override]).train
    assert (train.steps, train.epochs) == (steps, epochs)


@pytest.mark.parametrize("line", ["a" + " . b" * 50_000 + " = 1", "[" + "a." * 50_000 + "a]",
                                  "x = {" + "a" + '."b"' * 50_000 + " = 1}", "a" + ".b" * 500 + ".. = 1"])
def test_a_key_of_very_many_parts_is_refused_at_once(line):
    with pytest.raises(UserError, match=r"^p\.toml:11: a key of more than 9 parts"):
        preset.parse(f"{GOOD}\n{line}\n", "p.toml")
    with pytest.raises(UserError, match="a key of more than 9 parts"):
        preset.update_text(f"{GOOD}\n{line}\n", {})


def test_dots_in_texts_and_comments_are_no_keys():
    text = GOOD + '[sample]\nprompts = ["a.b.c.d.e.f.g.h.i.j.k", \'..........\'] # a.b.c.d.e.f.g.h.i.j.k\n'
    assert preset.parse(text, "p.toml").sample.prompts[0] == "a.b.c.d.e.f.g.h.i.j.k"
