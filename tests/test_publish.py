"""The file to use: what it holds, what its header says, and that a file that is not true to the adapter is refused."""

from __future__ import annotations

import base64
import io
import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests import projects
from trainer import publish as publishing
from trainer.errors import UserError
from trainer.events import EventReader
from trainer.export import verify
from trainer.publish import publish
from trainer.session import Session


@pytest.fixture(scope="module")
def session(tiny_project, tmp_path_factory) -> Session:
    made = projects.session(tiny_project, tmp_path_factory.mktemp("session"), "data.repeats=3", "output.dtype=fp32")
    with torch.no_grad():
        for leaf in made.adapter.parameters():
            leaf.add_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1)))
    made.adapter.ema_update()
    made.progress.step = 8
    made.progress.global_batch = 2
    return made


def test_the_file_is_verified_and_the_verdict_is_an_event(session) -> None:
    path = session.run.export_of(8)
    publish(session, path)
    event = [event for event in EventReader(session.run.events).read() if event["kind"] == "export"][-1]
    assert event["path"] == "exports/run-000008.safetensors" and event["step"] == 8
    assert event["bytes"] == path.stat().st_size
    assert (event["weights"], event["dtype"], event["format"]) == ("ema", "fp32", "U1")
    assert event["unmatched"] == [] and event["worst_rel_error"] < 1e-5
    assert not verify.compare(path, list(session.adapter.pairs("ema")), family="sd15").unmatched


def test_the_event_names_the_programs_that_read_all_of_it(session) -> None:
    publish(session, session.run.export_of(8))
    event = [event for event in EventReader(session.run.events).read() if event["kind"] == "export"][-1]
    assert event["readers"] == ["ComfyUI", "A1111", "Forge", "diffusers"] and event["others"] == []


def test_another_format_is_told_of_the_programs_that_do_not_read_it(session, monkeypatch) -> None:
    output = session.preset.output.model_copy(update={"format": "U2"})
    monkeypatch.setattr(session, "preset", session.preset.model_copy(update={"output": output}))
    publish(session, session.run.export_of(8))
    event = [event for event in EventReader(session.run.events).read() if event["kind"] == "export"][-1]
    assert (event["format"], event["unmatched"], event["readers"]) == ("U2", [], ["ComfyUI", "A1111", "Forge"])
    assert event["others"][0].startswith("diffusers raises an error or drops the UNet's blocks")


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda up: up * 0, "without any effect"),
    (lambda up: up[:-1], "layers of other shapes")])
def test_no_program_is_named_for_a_file_that_is_wrong_for_all(session, monkeypatch, spoil, words) -> None:
    real = publishing.writer.write
    monkeypatch.setattr(publishing.writer, "write", lambda path, pairs, **given: real(
        path, [(name, spoil(up), down, magnitude) for name, up, down, magnitude in pairs], **given))
    publish(session, session.run.export_of(8))
    event = [event for event in EventReader(session.run.events).read() if event["kind"] == "export"][-1]
    assert event["readers"] == [] and any(words in text for text in event["others"])


def test_the_cover_is_the_newest_trained_picture_of_the_first_prompt(session, monkeypatch) -> None:
    output = session.preset.output.model_copy(update={"cover": True})
    monkeypatch.setattr(session, "preset", session.preset.model_copy(update={"output": output}))
    session.run.samples.mkdir(exist_ok=True)
    for name, colour in {"000000_00": 0, "000004_00": 60, "000006_00": 120, "000006_01": 180,
                         "000007_asked1_00": 240}.items():
        Image.new("RGB", (32, 32), (colour, colour, colour)).save(session.run.samples / f"{name}.png")
    publish(session, session.run.export_of(8))
    with safe_open(session.run.export_of(8), "pt") as file:
        (text,) = json.loads(file.metadata()["ssmd_cover_images"])
    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
        assert abs(picture.getpixel((5, 5))[0] - 120) < 3


def test_the_header_says_what_was_trained_on(session) -> None:
    publish(session, session.run.result)
    with safe_open(session.run.result, "pt") as file:
        header = file.metadata()
    assert (header["ss_output_name"], header["ss_network_dim"], float(header["ss_network_alpha"])) == ("run", "4", 4.0)
    assert header["ss_steps"] == "8"
    assert json.loads(header["ss_dataset_dirs"]) == {"train": {"n_repeats": 3, "img_count": 7}}
    tags = json.loads(header["ss_tag_frequency"])
    assert sum(tags["train"].values()) == 21 and tags["train"]["circle"] == 7
    assert str(session.run.path) not in json.dumps(header)  # whose computer it was is nobody's business


def test_a_file_that_lacks_a_part_of_the_adapter_is_refused(session, monkeypatch) -> None:
    real = publishing.writer.write
    monkeypatch.setattr(publishing.writer, "write", lambda path, pairs, **given: real(path, pairs[1:], **given))
    with pytest.raises(UserError, match="does not hold all of the trained adapter: unet.down_blocks.0"):
        publish(session, session.run.export_of(9))
