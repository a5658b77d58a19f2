"""What a page may ask the data set tab for, and what it may not."""

import base64

import pytest

from app.captioning import Captioning, Progress
from app.components import server_function
from app.datasets.library import Library
from app.paths import Places
from app.tabs import dataset, dataset_tools
from app.tabs.dataset import AddFiles, SaveMask, Uploaded, add_files, decoded, uploaded
from app.tabs.dataset_requests import OfSet
from app.tabs.dataset_tools import ReadTraining, list_trainings, read_training
from tests.data_sets import draw, tree
from trainer.caption import task as captioner
from trainer.errors import UserError
from trainer.events import EventWriter

PRESET = ('[model]\nfamily = "flux1"\nbase = "base"\n[data]\nfolder = ["../datasets/cats", "more"]\nresolution = 768\n'
          'trigger = "sks"\n[train]\nsteps = 5\nbatch_size = 2\ngrad_accum = 3\n')


@pytest.fixture
def library(tmp_path):
    draw(tmp_path / "datasets/cats/a.png", caption="a cat")
    (tmp_path / "presets").mkdir()
    opened = Library(Places(tmp_path))
    yield opened
    opened.close()


@pytest.fixture
def cats(library):
    return library.open(library.list_sets()["sets"][0]["id"])


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    folder = tmp_path / "uploads"
    (folder / "0123").mkdir(parents=True)
    monkeypatch.setattr(dataset, "get_upload_folder", lambda: str(folder))
    return folder


def test_uploads_are_taken_in_and_cleared(cats, uploads):
    file = draw(uploads / "0123/b.png", seed=3)
    data = file.read_bytes()
    asked = AddFiles(id=cats.id, files=[Uploaded(name="5_more/b.png", path=str(file))])
    assert add_files(cats, asked)["added"] == 1
    assert tree(cats.root)["5_more/b.png"] == data and not file.exists()


@pytest.mark.parametrize("path", ["/etc/passwd", "../datasets/cats/a.png", "{uploads}/../datasets/cats/a.png",
                                  "{uploads}/0123/../../datasets/cats/a.png", "{uploads}/0123/link", "{uploads}",
                                  "{uploads}/0123/gone.png", ""])
def test_only_uploads_are_taken_in_and_nothing_else_is_ever_removed(cats, uploads, path):
    (uploads / "0123/link").symlink_to(cats.root / "a.png")
    before = tree(cats.root)
    asked = AddFiles(id=cats.id, files=[Uploaded(name="x.png", path=path.format(uploads=uploads))])
    with pytest.raises(UserError, match="not uploaded here|not there any more|leads out"):
        add_files(cats, asked)
    assert tree(cats.root) == before
    with pytest.raises(UserError):
        uploaded("")


def test_a_torn_mask_is_refused(cats):
    assert decoded(None) is None and decoded(base64.b64encode(b"x").decode()) == b"x"
    with pytest.raises(UserError, match="did not arrive whole"):
        decoded("no base64!")
    call = server_function("save_mask", SaveMask, lambda asked: cats.save_mask(asked.name, decoded(asked.png)))
    assert "is not in this data set" in call({"id": cats.id, "name": "../a.png", "png": None})["error"]


@pytest.mark.parametrize("id", ["nothing", "0123456789ab:cats", "{key}:../presets", "{key}:.studio", "{key}:"])
def test_only_folders_below_the_roots_are_data_sets(library, cats, id):
    call = server_function("read_info", OfSet, lambda asked: library.open(asked.id).info())
    assert call({"id": cats.id})["images"] == 1
    assert "error" in call({"id": id.format(key=cats.id.partition(":")[0])})


def test_requests_are_held_to_their_types(library):
    functions = [*dataset._of_library(library), *dataset._of_images(library), *dataset._of_changes(library),
                 *dataset_tools.functions(library, Captioning(library.places))]
    names = [function.__name__ for function in functions]
    assert len(names) == len(set(names)) > 30
    for function in functions:
        for nonsense in ([], "x", {"id": 1}, {"extra": True}, None):
            assert "do not understand each other" in function(nonsense)["error"], function.__name__


def test_panels_begin_with_the_preset_that_uses_the_data_set(library, cats):
    presets = library.places.presets
    (presets / "aa.toml").write_text(PRESET.replace("../datasets/cats", "../datasets/dogs"))
    (presets / "broken.toml").write_text("= not toml")
    assert list_trainings(library, cats)["using"] is None
    (presets / "mine.toml").write_text(PRESET)
    found = list_trainings(library, cats)
    assert found["using"] == "mine" and found["own"] == ["aa", "broken", "mine"] and "demo" in found["shipped"]


def test_the_panels_count_with_the_presets_settings(library):
    (library.places.presets / "mine.toml").write_text(PRESET)
    read = read_training(library, ReadTraining(shelf="own", name="mine"))
    assert (read["family"], read["resolution"], read["batch"], read["buckets"]) == ("flux1", 768, 6, True)
    assert read["handling"]["trigger"] == "sks" and sum(read["timesteps"]["shares"]) == pytest.approx(1)
    with pytest.raises(UserError, match="is not a name inside"):
        read_training(library, ReadTraining(shelf="own", name="../mine"))


def test_the_answer_that_says_a_captioner_has_ended_brings_its_last_proposals(library, cats):
    tasks = Captioning(library.places)
    task = captioner.create(library.places.workspace, captioner.parse({"folder": str(cats.root), "model": "m/n"}))

    class EndsMeanwhile(Captioning):
        def progress(self, name: str) -> Progress:
            EventWriter(task.results).write("caption", image="a.png", before="", after="a cat")
            EventWriter(task.events).write("end", reason="done", done=1, of=1)
            return tasks.progress(name)

    functions = dataset_tools.functions(library, EndsMeanwhile(library.places))
    read = next(function for function in functions if function.__name__ == "read_captioning")
    answer = read({"id": cats.id, "task": task.name, "start": 0})
    assert (answer["word"], answer["alive"]) == ("done", False)
    assert answer["rows"] == [{"image": "a.png", "before": "", "after": "a cat"}]
