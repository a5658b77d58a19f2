"""How far somebody is on the way to a first LoRA, by what lies on the disk, and the preset made for their pictures."""

import pytest

from app import cards
from app.datasets.library import Library
from app.jobs import Jobs
from app.paths import Places
from app.tabs import first_run
from tests.data_sets import draw
from tests.run_folders import finished
from trainer import preset
from trainer import run as runs


@pytest.fixture
def places(tmp_path):
    return Places(tmp_path / "w")


@pytest.fixture
def library(places):
    found = Library(places)
    yield found
    found.close()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(cards, "cards", list)


def pictures(places, name="My_Cat 2", count=10, captions=()):
    folder = places.datasets / name
    for number in range(count):
        draw(folder / f"{number}.png", caption=captions[number % len(captions)] if captions else None)
    return folder


def id_of(library, name="My_Cat 2"):
    return next(row["id"] for row in library.list_sets()["sets"] if row["name"] == name)


def test_steps_are_done_by_facts_and_the_demo_is_not_ones_own(places):
    jobs = Jobs(places)
    read = lambda: {key for key, value in first_run.read_steps(jobs).items() if value and key != "runs"}  # noqa: E731
    assert read() == set()
    (places.datasets / "empty").mkdir(parents=True)
    demo = preset.complete(preset.load(first_run.preset.SHIPPED / "demo.toml"), preset.SHIPPED)
    runs.create(places.workspace, "demo", preset.dumps(demo)).result.write_bytes(b"lora")
    assert read() == set()
    draw(places.datasets / "cats" / "a.png")
    assert read() == {"pictures"}
    (places.datasets / "cats" / "a.txt").write_text("a cat")
    assert read() == {"pictures", "captions"}
    places.presets.mkdir()
    (places.presets / "p.toml").write_text("")
    assert read() == {"pictures", "captions", "settings"}
    finished(places.workspace, "mine")
    jobs = Jobs(places)  # a listing is shared for half a second
    assert first_run.read_steps(jobs)["trained"] == "mine"
    places.exports.mkdir()
    (places.exports / "a.safetensors").write_bytes(b"")
    assert read() == {"pictures", "captions", "settings", "trained", "made"}


def test_without_a_gpu_the_demos_base_learns_the_pictures_and_it_says_so(places, library, no_gpu):
    folder = pictures(places)
    answer = first_run.prepare(places, library, id_of(library))
    assert answer["shelf"] == "own" and answer["name"] == "My_Cat 2"
    assert "No NVIDIA graphics card was found" in answer["said"]
    made = preset.load(places.presets / "My_Cat 2.toml")
    assert made.data.folder == folder.as_posix() and made.data.trigger == "my cat 2"
    assert made.sample.prompts[0] == "my cat 2" and "my cat 2, octopus, animal, creature, ocean" in made.sample.prompts
    assert "openmoji" not in (places.presets / "My_Cat 2.toml").read_text().lower()
    assert made.model.base == str(preset.SHIPPED / "demo/base")
    assert (made.evaluate.folder, made.evaluate.holdout, made.evaluate.distance) == ("", 0.1, "off")


@pytest.mark.parametrize("gpus, shipped", [
    ([], "demo"), ([{"gib": 6}], "sd15_stella"), ([{"gib": None}], "sd15_stella"),
    ([{"gib": 6}, {"gib": 24}], "sdxl_stiefel"),
])
def test_the_preset_fits_the_machine(gpus, shipped):
    assert first_run.choose(gpus)[0] == shipped


@pytest.mark.parametrize("gib", [0, 6, 24])
@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("captions", [(), ("a red cat", "a blue cat, outside\nat noon")])
def test_what_is_made_can_be_started(places, library, monkeypatch, gib, count, captions):
    monkeypatch.setattr(cards, "cards", lambda: [{"gib": gib}] if gib else [])
    pictures(places, count=count, captions=captions)
    name = first_run.prepare(places, library, id_of(library))["name"]
    made = preset.load(places.presets / f"{name}.toml")
    assert made.evaluate.holdout == (0.1 if count == 10 else 0.0)
    if captions:
        assert made.data.trigger == "" and set(made.sample.prompts) <= {"a red cat", "a blue cat, outside at noon"}
    else:
        assert made.data.trigger == "my cat 2" and made.sample.prompts[0] == "my cat 2"


def test_a_data_set_has_one_preset_and_another_ones_is_not_touched(places, library, no_gpu):
    pictures(places)
    pictures(places, "demo")
    first = first_run.prepare(places, library, id_of(library))
    text = (places.presets / "My_Cat 2.toml").read_text()
    assert first_run.prepare(places, library, id_of(library))["name"] == first["name"]
    assert (places.presets / "My_Cat 2.toml").read_text() == text
    assert first_run.prepare(places, library, id_of(library, "demo"))["name"] == "demo-2"  # the shipped one is demo


def test_a_data_set_without_images_is_told_in_a_sentence(places, library):
    library.create("none")
    assert "no images yet" in first_run.prepare(places, library, id_of(library, "none"))["error"]
    assert not places.presets.exists()


@pytest.mark.parametrize("name, preset_name, word", [
    ("Ünï", "n", "ünï"), ("猫", "my pictures", "猫"), ("a" * 150, "a" * 70, "a" * 150), ("con", "my pictures", "con"),
])
def test_any_name_of_a_data_set_will_do(places, library, no_gpu, name, preset_name, word):
    pictures(places, name, 1)
    answer = first_run.prepare(places, library, id_of(library, name))
    assert answer["name"] == preset_name
    assert preset.load(places.presets / f"{preset_name}.toml").data.trigger == word
