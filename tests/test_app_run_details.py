"""What the page asks of a run beside its events: hard images, spectra, notes, checkpoints, prompts."""

import time

import pytest

from app import run_details
from app.datasets.library import Library
from app.paths import Places
from app.run_details import RunDetails
from tests.data_sets import draw
from tests.measured_run import PROMPTS, measured
from trainer import preset
from trainer.errors import UserError
from trainer.events import EventWriter


@pytest.fixture
def ours(tmp_path):
    return measured(tmp_path / "w")


@pytest.fixture
def details(tmp_path, ours):
    library = Library(Places(tmp_path / "w"))
    yield RunDetails(library)
    library.close()


def test_hard_images_have_a_name_in_their_data_set_and_a_small_picture_soon(details, ours):
    end = time.monotonic() + 30
    while not (answer := details.hard(ours, 3))["images"][0]["thumb"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    [worst, *_] = answer["images"]
    assert (worst["file"], worst["ratio"], worst["times"]) == ("cat07.png", 3.0, 16)
    assert (answer["harder"], answer["measured"]) == (9, 12)
    assert len(answer["images"]) == 3 and worst["set"].endswith(":cats")
    assert "/thumbnails/" in worst["thumb"]


def test_images_elsewhere_are_named_and_neither_linked_nor_looked_at(details, ours, tmp_path):
    draw(tmp_path / "secret.png")
    (tmp_path / "w/datasets/cats/out.png").symlink_to(tmp_path / "secret.png")
    folder = tmp_path / "w/datasets/cats"
    strange = {str(tmp_path / "secret.png"): [9, 9.0], f"{folder}/../../../secret.png": [9, 8.0],
               "/etc/passwd": [9, 7.0], "../x.png": [9, 6.0], str(folder / "out.png"): [9, 5.0],
               str(folder / "gone.png"): [9, 4.5]}
    EventWriter(ours.events).write("image_loss", step=200, images=strange)
    rows = details.hard(ours, 6)["images"]
    assert [bool(row["set"]) for row in rows] == [False] * 4 + [True] * 2
    assert [row["thumb"] for row in rows] == [None] * 4 + [""] * 2
    time.sleep(0.3)
    assert [row["thumb"] for row in details.hard(ours, 6)["images"]] == [None] * 4 + [""] * 2


def test_a_data_set_that_the_app_may_not_open_has_no_links(tmp_path, ours):
    library = Library(Places(tmp_path / "another"))
    answer = RunDetails(library).hard(ours, 5)
    assert all(row["set"] == "" and row["thumb"] is None for row in answer["images"])
    assert answer["images"][0]["file"] == "cat07.png"
    library.close()


def test_the_images_that_came_with_the_app_are_shown_though_they_are_no_data_set_of_it(details, ours):
    concept = preset.SHIPPED / "demo" / "concept"
    known = preset.load(ours.preset)
    data = known.data.model_copy(update={"folder": str(concept)})
    ours.preset.write_text(preset.dumps(known.model_copy(update={"data": data})))
    EventWriter(ours.events).write("image_loss", step=200, images={str(concept / "owl.png"): [9, 50.0]})
    end = time.monotonic() + 30
    while not (row := details.hard(ours, 1)["images"][0])["thumb"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert (row["file"], row["set"]) == ("owl.png", "") and "/thumbnails/" in row["thumb"]


def test_each_of_several_folders_is_a_data_set_of_its_own(details, ours, tmp_path):
    dogs = tmp_path / "w/datasets/dogs"
    draw(dogs / "dog.png")
    cats = (tmp_path / "w/datasets/cats").as_posix()
    text = ours.preset.read_text()
    assert f'folder = "{cats}"' in text
    ours.preset.write_text(text.replace(f'folder = "{cats}"', f'folder = ["{cats}", "{dogs.as_posix()}"]'))
    EventWriter(ours.events).write("image_loss", step=200, images={str(dogs / "dog.png"): [9, 50.0]})
    rows = details.hard(ours, 2)["images"]
    assert [(row["file"], row["set"].partition(":")[2]) for row in rows] == [("dog.png", "dogs"), ("cat07.png", "cats")]


def test_a_spectrum_is_that_of_the_nearest_measurement_beside_the_first(ours):
    answer = run_details.spectrum(ours, "mid 0", 110)
    assert (answer["step"], answer["rank"], answer["erank"]) == (100, 16, 7.0)
    assert answer["values"][0] == 1.0 and len(answer["values"]) == 16 and answer["first"]["step"] == 25
    assert answer["first"]["values"] != answer["values"]
    with pytest.raises(UserError, match="no spectrum was measured of 'elsewhere'"):
        run_details.spectrum(ours, "elsewhere", 100)


def test_a_spectrum_that_is_none_is_passed_over(ours):
    writer = EventWriter(ours.events)
    writer.write("rank", step=300, spectrum={"odd": ["x", 1.0]}, blocks={"odd": 3})
    assert run_details.spectrum(ours, "odd", 300)["values"] == [None, 1.0]
    assert run_details.spectrum(ours, "odd", 300)["erank"] is None


def test_notes_and_checkpoints_come_only_when_they_are_others(ours):
    first = run_details.beside(ours, "")
    assert first["checkpoints"] == [[50, False], [100, False], [150, False], [200, False]]
    assert first["own_notes"] == "" and run_details.beside(ours, first["seen"]) == {}
    ours.pin(50, True)
    second = run_details.beside(ours, first["seen"])
    assert second["checkpoints"][0] == [50, True]
    assert run_details.save_notes(ours, "a remark", first["notes_tag"])["saved"]
    third = run_details.beside(ours, second["seen"])
    assert third["own_notes"] == "a remark"
    ours.pin(50, False)
    assert not ours.is_pinned(50)
    with pytest.raises(UserError, match="no checkpoint of step 7 any more"):
        ours.pin(7, True)


def test_notes_that_somebody_else_changed_are_not_written_over(ours):
    empty = run_details.notes_tag("")
    tag = run_details.save_notes(ours, "mine", empty)["notes_tag"]
    refused = run_details.save_notes(ours, "theirs", empty)
    assert refused == {"saved": False, "own_notes": "mine", "notes_tag": tag}
    assert run_details.save_notes(ours, "mine", empty)["saved"]  # the same text is no conflict
    assert run_details.save_notes(ours, "", tag)["saved"] and not (ours.path / "notes.md").exists()


def test_prompts_are_the_presets_and_a_broken_preset_has_none(ours):
    assert run_details.prompts(ours) == PROMPTS
    ours.preset.write_text("x = =")
    assert run_details.prompts(ours) == []
