"""The table of wrong inputs: each ends with code 1, one plain message, and nothing in the way of the next try.

Every row goes through the command line as a user does; what the message must say is a regular expression.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import Outcome
from trainer import preset as presets
from trainer import run as runs
from trainer.run import Run

MAX_MESSAGE = 700  # characters; more is not read


def assert_plain(outcome: Outcome, message: str) -> None:
    """One message that says it; no word of the program's own insides."""
    assert outcome.code == 1, outcome.err
    assert re.search(message, outcome.err), outcome.err
    assert "Traceback" not in outcome.err and "Error:" not in outcome.err and "fault of the program" not in outcome.err
    assert len(outcome.err) < MAX_MESSAGE + outcome.err.count("/tmp/") * 100, outcome.err
    lines = outcome.err.strip().splitlines()
    assert len(lines) == len(set(lines))


# Settings, in the file or typed

SETTINGS = {
    "a key misspelt": ("train.stepz=5", r"--set train\.stepz=5: no such key\. Did you mean steps\?"),
    "a section misspelt": ("trian.steps=5", r"no such section\. Did you mean train\?"),
    "a word for a number": ("train.steps=many", r"--set train\.steps=many: should be a whole number, not 'many'"),
    "a number for a list": ("sample.prompts=5", r"--set sample\.prompts=5: should be a list in brackets, not 5"),
    "true for a number": ("train.steps=true", r"should not be true or false"),
    "a negative rate": ("train.lr=-1", r"--set train\.lr=-1: .*greater than 0"),
    "no number at all": ("train.lr=nan", r"--set train\.lr=nan: .*number"),
    "alpha that is not rank": ("adapter.alpha=1", r"alpha must equal rank \(4\), not 1; leave it out"),
    "a method misspelt": ("adapter.method=stela", r"Did you mean stella\?"),
    "a start of another method": ("adapter.init=svd-major", r"'svd-major' does not go with adapter\.method = 'lora'"),
    "an optimizer of another method": ("train.optimizer=stiefel", r"'stiefel' does not go with .*'lora'"),
    "a resolution off the grid": ("data.resolution=100", r"multiple of 8"),
    "a rank of zero": ("adapter.rank=0", r"greater than or equal to 1"),
    "an average that is not kept": (["train.ema_decay=0", "output.weights=ema"],
                                    r"'ema' needs train\.ema_decay above 0"),
    "a setting without effect": ("data.crop_variants=9", r"has no effect with data\.crop = 'center'; take it out"),
    "--set without a value": ("train.steps", r"--set train\.steps: write it as section\.key=value"),
    "--set without a section": ("steps=5", r"--set steps=5: write it as section\.key=value"),
    "a family that is not there": ("model.family=sd3", r"should be 'sd15'"),
    "a GPU that is not there": ("memory.device=cuda:99", r"memory\.device = 'cuda:99': torch sees \d+ CUDA GPUs here"),
    "an Apple GPU that is not there": ("memory.device=mps", r"torch sees no Apple GPU here"),
    "a device that is none": ("memory.device=tpu", r"should be one of these: auto, cpu, .* as cuda:0,1, not 'tpu'"),
    "a rank beyond a layer": (
        "adapter.rank=64", r"adapter\.rank = 64 is too high for unet\.\S+, a 32 x 32 matrix: choose at most"),
    "a base that is not there": (
        "model.base=nowhere/to/be", r"no folder or file \S+/nowhere/to/be: model\.base must be"),
    "a VAE that is not there": ("model.vae=/nowhere/vae.safetensors", r"/nowhere/vae\.safetensors"),
    "a tokenizer that is not there": (
        "model.tokenizer=/nowhere", r"/nowhere: model\.tokenizer must be a tokenizer folder"),
    "a layer of CLIP that is not there": (
        "model.clip_skip=4", r"model\.clip_skip = 4, and the text encoder has 3 layers"),
    "images that are not there": ("data.folder=/nowhere", r"data\.folder: /nowhere is not there; give the folder"),
    "held-out images that are not there": ("evaluate.folder=/nowhere", r"evaluate\.folder: /nowhere is not there"),
    "held-out images twice": ("evaluate.holdout=0.2", r"evaluate\.folder already names the held-out images"),
    "Inception that is not there": (["evaluate.distance=inception", "evaluate.inception_weights=/nowhere.pth"],
                                    r"evaluate\.inception_weights: no file /nowhere\.pth"),
}


@pytest.mark.parametrize("overrides, message", SETTINGS.values(), ids=SETTINGS)
def test_a_wrong_setting_is_told(tiny_project, tmp_path, trainer, overrides, message) -> None:
    overrides = [overrides] if isinstance(overrides, str) else overrides
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, *(f"--set={item}" for item in overrides))
    assert_plain(outcome, message)
    assert not runs.is_taken(tmp_path, "tiny")


FILES = {
    "broken TOML": (b"[model\nfamily = 1", r"bad\.toml:1: not valid TOML"),
    "a Windows path": (rb'model.base = "C:\Users\me"', r"not valid TOML: .*; write Windows paths with / or in 'single"),
    "Latin-1": ("# für\n".encode("latin-1"), r"bad\.toml: not UTF-8 text \(byte 3\); save it as UTF-8"),
    "nothing in it": (b"", r"model\.family: is missing"),
    "a key before the sections": (b"rank = 4\n", r"bad\.toml:1: rank: stands outside of a section"),
    "of a later program": (b"version = 99\n", r"version 99, and this program knows 1.*update the program"),
}


@pytest.mark.parametrize("content, message", FILES.values(), ids=FILES)
def test_a_wrong_preset_file_is_told(tmp_path, trainer, content, message) -> None:
    (tmp_path / "bad.toml").write_bytes(content)
    assert_plain(trainer("--preset", tmp_path / "bad.toml", "--workspace", tmp_path), message)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_preset_is_told_with_what_there_is(tiny_project, tmp_path, trainer) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "portrait.toml").write_bytes(tiny_project.read_bytes())
    outcome = trainer("--preset", "portrat", "--workspace", tmp_path)
    assert_plain(outcome, r"no preset 'portrat'.*Did you mean portrait\? There are: .*portrait")


# Images and captions


def latin_caption(folder: Path) -> None:
    (folder / "001.txt").write_bytes("Käse".encode("latin-1"))


def utf16_caption(folder: Path) -> None:
    (folder / "001.txt").write_text("cheese", "utf-16")


def only_corrupt(folder: Path) -> None:
    for image in folder.glob("*.png"):
        image.write_bytes(image.read_bytes()[:60])


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def only_other_types(folder: Path) -> None:
    for image in folder.glob("*.png"):
        image.rename(image.with_suffix(".heic"))


IMAGES = {
    "a caption in Latin-1": (latin_caption, r"001\.txt: the caption is not UTF-8 text \(byte 1\); save it as UTF-8"),
    "a caption in UTF-16": (utf16_caption, r"001\.txt: the caption is not UTF-8 text .*; save it as UTF-8"),
    "only corrupt images": (only_corrupt, r"data\.folder: none of the 7 images in \S+ can be used:\n.*000\.png: \w+"),
    "an empty folder": (empty, r"data\.folder: no images in \S+ or its sub-folders \(known types: .*png"),
    "types that are not read": (
        only_other_types, r"none of the 7 images.*\n.*000\.heic: HEIC files are not read; save it"),
}


@pytest.mark.parametrize("spoil, message", IMAGES.values(), ids=IMAGES)
def test_a_wrong_data_set_is_told_and_the_same_command_trains_when_it_is_mended(
    own_project, tiny_project, tmp_path, trainer, spoil, message
) -> None:
    command = ["--preset", own_project, "--workspace", tmp_path, "--name", "try"]
    spoil(own_project.parent / "train")
    assert_plain(trainer(*command), message)
    state = Run(tmp_path / "runs" / "try").state()
    assert state.word == "failed" and re.search(message, state.text)  # the app says the same
    mended = f"data.folder={tiny_project.parent / 'train'}"
    assert trainer(*command, f"--set={mended}", "--set=train.steps=1", "--set=sample.prompts=[]").code == 0


def test_one_corrupt_image_is_named_and_left_out(own_project, tmp_path, trainer) -> None:
    image = own_project.parent / "train" / "003.png"
    image.write_bytes(image.read_bytes()[:60])
    outcome = trainer("--preset", own_project, "--workspace", tmp_path, "--set=train.steps=1",
                      "--set=sample.prompts=[]")
    assert outcome.code == 0
    assert re.search(r"skipped \S+003\.png: \w+", Run(tmp_path / "runs" / "tiny").log.read_text("utf-8"))


# Base models


def lora(folder: Path) -> Path:
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(4, 2), "lora_unet_x.lora_down.weight": torch.zeros(2, 4)},
              folder / "style.safetensors")
    return folder / "style.safetensors"


def sdxl(folder: Path) -> Path:
    start = "model.diffusion_model."
    save_file({f"{start}input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
               f"{start}label_emb.0.0.weight": torch.zeros(8, 8),
               f"{start}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, 2048)},
              folder / "xl.safetensors")
    return folder / "xl.safetensors"


def pickle(folder: Path) -> Path:
    torch.save({"state_dict": {}}, folder / "model.ckpt")
    return folder / "model.ckpt"


def truncated(folder: Path) -> Path:
    whole = sdxl(folder)
    whole.write_bytes(whole.read_bytes()[:-100])
    return whole


def web_page(folder: Path) -> Path:
    (folder / "model.safetensors").write_text("<!doctype html><title>Sign in</title>")
    return folder / "model.safetensors"


def no_model(folder: Path) -> Path:
    (folder / "pictures").mkdir()
    return folder / "pictures"


BASES = {
    "a LoRA": (lora, r"style\.safetensors is a LoRA, not a base model, .*choose another model\.base"),
    "a model of another family": (
        sdxl, r"xl\.safetensors is an SDXL model, and model\.family = 'sd15' needs .*: set model\.family = 'sdxl'"),
    "a pickle": (pickle, r"model\.ckpt is a pickle, which can run any program .*use the \.safetensors"),
    "a file cut short": (truncated, r"xl\.safetensors is cut short: it has [\d,]+ of [\d,]+ bytes\. Download it again"),
    "a web page": (web_page, r"not a safetensors file but a web page: download the file itself"),
    "a folder of other things": (no_model, r"pictures is not a model: it has no model_index\.json"),
}


@pytest.mark.parametrize("make, message", BASES.values(), ids=BASES)
def test_a_wrong_base_is_told(tiny_project, tmp_path, trainer, make, message) -> None:
    base = make(tmp_path)
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, f"--set=model.base={base}")
    assert_plain(outcome, message)
    assert not runs.is_taken(tmp_path, "tiny")


def test_a_hub_model_without_a_connection_is_told(tiny_project, tmp_path, trainer, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, "--set=model.base=somebody/some-model")
    assert_plain(outcome, r"somebody/some-model is not on this machine, and the hub cannot be reached.*path of a local")


def test_a_package_that_cannot_be_loaded_is_told(tiny_project, tmp_path, trainer, monkeypatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, "--set=train.optimizer=adamw8bit")
    assert_plain(outcome, r"train\.optimizer = 'adamw8bit' needs the package bitsandbytes.*or use adamw")


# Names, runs and disks

NAMES = {"up and out": "../elsewhere", "absolute": "/tmp/elsewhere", "empty": "", "hidden": ".run", "a device": "con",
         "a dash first": "-rf", "a tab": "a\tb", "too long": "x" * 101}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_that_cannot_be_a_folders_is_told(tiny_project, tmp_path, trainer, name) -> None:
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path / "workspace", f"--name={name}")
    assert_plain(outcome, r"cannot be a run's name: use letters, digits")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(tiny_project: Path, tmp_path: Path) -> Run:
    """A run that nobody has trained yet."""
    return runs.create(tmp_path, "cat", presets.dumps(presets.load(tiny_project)))


def test_a_taken_name_is_told_with_the_way_to_go_on(run, tiny_project, tmp_path, trainer) -> None:
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, "--name", "cat")
    assert_plain(outcome, r"already a run called 'cat'.*--resume \S+/runs/cat\. For a new one give another --name")
    assert runs.free_name(tmp_path, "cat") == "cat-2"


def step_saved(run: Run, step: int) -> Path:
    folder = run.checkpoint(step)
    folder.mkdir(parents=True)
    return folder


RESUMES = {
    "a changed method": (
        ["--set=adapter.method=stella"], r"a resume may change only train\.steps.* not adapter\.method"),
    "another share held out": (["--set=evaluate.folder=", "--set=evaluate.holdout=0.3"], r"not evaluate\.holdout;"),
    "changed images": (["--set=data.folder=/nowhere"], r"not data\.folder; start a new run"),
    "fewer steps than made": (["--set=train.steps=2"], r"train\.steps=2: this run is already at step 3; give as many"),
    "a new name": (["--name=dog"], r"--name goes with --preset and --branch; a resumed run keeps its name"),
    "a damaged checkpoint": ([], r"step_000003 is damaged .*delete that folder to resume from the one before"),
}


@pytest.mark.parametrize("arguments, message", RESUMES.values(), ids=RESUMES)
def test_a_wrong_resume_is_told_and_changes_nothing(run, trainer, arguments, message) -> None:
    (step_saved(run, 3) / "progress.json").write_text('{"format": 1, "st')
    before = run.preset.read_bytes()
    assert_plain(trainer("--resume", run.path, *arguments), message)
    assert run.preset.read_bytes() == before and run.checkpoint_steps() == [3]


def test_a_checkpoint_of_a_later_program_is_told(run, trainer) -> None:
    (step_saved(run, 3) / "progress.json").write_text('{"format": 99}')
    assert_plain(trainer("--resume", run.path), r"written by a newer version of this program; update it")


def test_a_folder_that_is_no_run_is_told(tmp_path, trainer) -> None:
    assert_plain(trainer("--resume", tmp_path), r"not a run folder \(it has no preset\.toml\); give one such as")


def test_a_second_trainer_is_told_and_touches_nothing(run, trainer) -> None:
    with run.hold():
        before = sorted(run.path.rglob("*"))
        outcome = trainer("--resume", run.path, "--set=log.every=9")
        assert_plain(outcome, r"is being trained by another process; stop that")
        assert sorted(run.path.rglob("*")) == before
    assert presets.load(run.preset).log.every == 1


WORKSPACES = {"a file": "file", "below a file": "file/deep", "a place that refuses": "/proc/nowhere"}


@pytest.mark.parametrize("place", WORKSPACES.values(), ids=WORKSPACES)
def test_a_workspace_that_cannot_be_made_is_told(tiny_project, tmp_path, trainer, place) -> None:
    (tmp_path / "file").touch()
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path / place)
    assert_plain(outcome, r"cannot be written: \w.*; see that .*this user may use it, or choose another --workspace")


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """The system refuses every byte of a file beyond `limit`, as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(tiny_project, tmp_path, trainer) -> None:
    command = ["--preset", tiny_project, "--workspace", tmp_path, "--set=sample.prompts=[]",
               "--set=log.tensorboard=false"]
    with full_disk(100_000):
        outcome = trainer(*command)
    assert_plain(outcome, r"the last checkpoint could not be written.*free some space, then resume")
    run = Run(tmp_path / "runs" / "tiny")
    assert not [path for path in run.path.rglob("*") if path.suffix in (".safetensors", ".tmp", ".partial")]
    assert runs.is_taken(tmp_path, "tiny")  # six steps were made
    assert trainer("--resume", run.path).code == 0
    assert run.state().word == "done"


def test_a_disk_without_room_for_a_preset_leaves_no_run(tiny_project, tmp_path, trainer) -> None:
    with full_disk(100):
        outcome = trainer("--preset", tiny_project, "--workspace", tmp_path)
    assert_plain(outcome, r"cannot be written: .*make room")
    assert not runs.is_taken(tmp_path, "tiny")


def test_a_disk_without_room_for_the_cache_is_told(tiny_project, tmp_path, trainer) -> None:
    (tmp_path / "cache").touch()
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path)
    assert_plain(outcome, r"the cache in \S+ cannot be written.*choose another workspace")


# The command line itself

LINES = {
    "nothing": ([], r"one of the arguments --preset --resume --branch is required; .*--help"),
    "both": (["--preset=a", "--resume=b"], r"not allowed with argument"),
    "an option misspelt": (["--preset=a", "--stes=5"], r"unrecognized arguments: --stes=5; .*--help"),
    "--json alone": (["--preset=a", "--json"], r"--json goes with --check"),
}


@pytest.mark.parametrize("arguments, message", LINES.values(), ids=LINES)
def test_a_wrong_command_line_is_told(trainer, arguments, message) -> None:
    assert_plain(trainer(*arguments), message)
