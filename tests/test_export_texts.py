"""Metadata of files made of others: what people write over them, what is kept, what is private."""

import json
import time

import pytest
import torch
from PIL import Image

from trainer import preset
from trainer.errors import UserError
from trainer.export import metadata, texts
from trainer.export.__main__ import main
from trainer.export.convert import convert
from trainer.export.lora_file import open_lora
from trainer.export.texts import Labels
from trainer.export.writer import write

PRESET = """[model]
family = "sd15"
base = "/home/ada/models/base"
[data]
folder = ["/home/ada/cats", "/home/ada/dogs"]
[train]
steps = 10
"""


def made(path, **said):
    write(path, [("unet.conv_in", torch.ones(8, 2), torch.ones(2, 4), None)], family="sd15", dtype="fp32",
          metadata=said)
    return path


def test_labels_are_written_over_what_is_there(tmp_path):
    Image.new("RGB", (900, 700), "red").save(tmp_path / "cover.png")
    source = made(tmp_path / "a.safetensors", **{"modelspec.author": "old", "note": "kept"})
    labels = Labels("My style", "Ada", ("ohwx", "in my style"), tmp_path / "cover.png")
    convert(source, "auto", tmp_path / "b.safetensors", labels=labels)
    said = open_lora(tmp_path / "b.safetensors").metadata
    assert said["modelspec.title"] == "My style" and said["modelspec.author"] == "Ada" and said["note"] == "kept"
    assert said["modelspec.trigger_phrase"] == "ohwx, in my style"
    assert json.loads(said["trained_words"]) == ["ohwx", "in my style"]
    assert said["modelspec.thumbnail"].startswith("data:image/jpeg;base64,") and len(said["ssmd_cover_images"]) > 100
    convert(tmp_path / "b.safetensors", "auto", tmp_path / "c.safetensors")
    again = open_lora(tmp_path / "c.safetensors").metadata
    assert {**again, "ss_output_name": ""} == {**said, "ss_output_name": ""}  # nothing given: nothing changed


def test_a_cover_that_is_no_picture_is_told(tmp_path):
    (tmp_path / "cover.png").write_text("hello")
    for name in ("cover.png", "none.png"):
        with pytest.raises(UserError, match=f"{name} cannot be read as a picture"):
            texts.labelled({}, Labels(cover=tmp_path / name))


@pytest.mark.parametrize(("text", "cut"), [
    ("/home/ada/models/base.safetensors", "base.safetensors"),
    ("C:\\Users\\Ada Lovelace\\models\\base.safetensors", "base.safetensors"),
    ("~/lora/cats", "cats"),
    ("/mnt/My Files/cats", "cats"),
    ("trained on /home/ada/cats and /home/ada/dogs", "trained on cats and dogs"),
    ('{"image_dir":"/home/ada/5_cat","n":5}', '{"image_dir":"5_cat","n":5}'),
    ('{"/home/ada/5_cat":{"img_count":3}}', '{"5_cat":{"img_count":3}}'),
    ('["E:\\\\data\\\\cats"]', '["cats"]'),
    ("file:///home/bob/x.safetensors", "x.safetensors"), ("see file:///home/bob/x.pt, it", "see x.pt, it"),
    ("name:/home/bob/x", "name:x"), ("in /home/bob/ and", "in  and"), ("in /home/bob and", "in  and"),
    ("/home/bob", ""), ("C:\\Users\\John Smith", ""), ("in /data/bob/cats/ and", "in  and"),
    ("saved to C:\\Users\\John Smith\\loras\\a.safetensors", "saved to a.safetensors"),
    ("at /Users/Jane Doe/My Loras/a.pt now", "at a.pt now"), ("on /mnt/c/Users/Bob Smith/a.pt", "on a.pt"),
    ("on \\\\nas\\bob share\\a.pt", "on a.pt"), ("in ~/My Loras/a.pt", "in a.pt"),
    ('{"a": "C:/Users/Smith, John/a.pt", "b": 1.0}', '{"a":"a.pt","b":1.0}'),
    ('{"a": 1, "b": "1/2"}', '{"a": 1, "b": "1/2"}'), ("the /w/ sound", "the /w/ sound"),
    ("see https://x.org/home/bob/y", "see https://x.org/home/bob/y"), ("data/home/bob", "data/home/bob"),
    ("https://github.com/black-forest-labs/flux", "https://github.com/black-forest-labs/flux"),
    ("stable-diffusion-xl-v1-base/lora", "stable-diffusion-xl-v1-base/lora"),
    ("someone/some-model", "someone/some-model"), ("1/2", "1/2"), ("and/or", "and/or"), ("(512, 512)", "(512, 512)"),
    ("data:image/jpeg;base64,/9j/4AAQSkZJRg/abc/def==", "data:image/jpeg;base64,/9j/4AAQSkZJRg/abc/def=="),
    ('["/9j/4AAQSkZJRg/abc/def+xyz=="]', '["/9j/4AAQSkZJRg/abc/def+xyz=="]'),
])
def test_folders_of_a_computer_go_and_all_else_stays(text, cut):
    key = "modelspec.thumbnail" if text.startswith("data:") else "ssmd_cover_images" if "/9j/" in text else "note"
    assert texts.kept({key: text}) == ({key: cut} if cut else {})
    assert texts.kept({key: text}, paths=True) == {key: text}


def test_a_presets_folders_go_too():
    whole = preset.parse(PRESET, "a.toml")
    said = texts.kept({metadata.PRESET_KEY: preset.dumps(whole), "x": "1"})
    left = preset.parse(said[metadata.PRESET_KEY], "b.toml")
    assert left == metadata.without_paths(whole) and left.train == whole.train
    assert texts.kept({metadata.PRESET_KEY: "no preset"}) == texts.kept({metadata.PRESET_KEY: "a=" + "[" * 5000}) == {}


def test_of_very_many_tags_the_most_frequent_stay():
    """They would make the header larger than ComfyUI reads."""
    counts = {f"tag {i}": i for i in range(1, 40_000)}
    kept = json.loads(texts.kept({"ss_tag_frequency": json.dumps({"cats": counts})})["ss_tag_frequency"])["cats"]
    assert 1000 < len(kept) < 39_999 and kept == {tag: counts[tag] for tag in list(counts)[-len(kept):]}


def test_several_files_keep_what_they_agree_on():
    one = {"a": "1", "b": "1", "ss_network_dim": "4", "ss_tag_frequency": '{"x":{"cat":2,"dog":1}}',
           "sshs_model_hash": "1", "trained_words": '["one"]'}
    two = {"a": "1", "b": "2", "ss_tag_frequency": '{"x":{"cat":3},"y":{"sky":1}}', "modelspec.trigger_phrase": "two"}
    found = texts.joined([one, two])
    assert found.pop("ss_tag_frequency") == '{"x":{"cat":5,"dog":1},"y":{"sky":1}}'
    assert found == {"a": "1", "ss_network_dim": "", "modelspec.trigger_phrase": "one, two",
                     "trained_words": '["one","two"]'}


@pytest.mark.parametrize("text", ["{", "[1,2]", '"a"', "[" * 100_000, '{"x":3}', '{"x":{"cat":"many"}}'])
def test_texts_of_other_shapes_are_left_alone(text):
    said = {"ss_tag_frequency": text, "trained_words": text, texts.HISTORY: text}
    assert texts.history(said) == [] and texts.frequent_tags(said, 5) == [] and isinstance(texts.triggers(said), list)
    texts.joined([said, said])
    texts.kept(said)


def test_history_grows_by_a_step():
    said = texts.with_step(texts.with_step({}, "merge", rank=4), "resize", rank=2)
    assert texts.history(said) == [{"what": "merge", "rank": 4}, {"what": "resize", "rank": 2}]


@pytest.mark.parametrize("tool", [["convert", "A", "--to", "auto"], ["resize", "A", "--rank", "1"],
                                  ["merge", "A", "A"]])
def test_every_tool_leaves_folders_out_unless_asked(tmp_path, tool):
    source = made(tmp_path / "a.safetensors", note="from /home/ada/cats", **{"modelspec.title": "/home/ada/x"})
    arguments = [str(source) if word == "A" else word for word in tool]
    for option, note in (([], "from cats"), (["--keep-paths"], "from /home/ada/cats")):
        out = tmp_path / f"{len(option)}.safetensors"
        assert main([*arguments, "--out", str(out), *option]) == 0
        said = open_lora(out).metadata
        assert said["note"] == note and ("/home/ada" in json.dumps(said)) == bool(option)


@pytest.mark.parametrize("piece", ["/", "/a", "C:\\", "~/a b ", "/home/", "/home/a b ", "\\\\a\\", "a,b c "])
def test_long_texts_are_cleaned_at_once(piece):
    begin = time.perf_counter()
    texts.kept({"note": "t " + piece * 20_000})
    assert time.perf_counter() - begin < 2
