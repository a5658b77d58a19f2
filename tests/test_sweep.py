"""A comparison from one preset: what is queued, under which names, and what is told before."""

import json
import tomllib

import pytest
import torch

from tests.projects import session as open_session
from tests.run_folders import PRESET, finished
from trainer import preset as presets
from trainer import sweep
from trainer.errors import UserError
from trainer.material import noise_seeds
from trainer.queue import Queue
from trainer.sweep import Choice


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "style.toml"
    path.write_text(PRESET + 'lr = { lora = 2e-4, stella = 1e-3 }\n[evaluate]\nfolder = "held"\n')
    return path


def test_a_run_of_each_with_plain_names_and_the_methods_own_rate(tmp_path, preset):
    planned = sweep.plan(tmp_path, preset, sweep.parse("lora,stella", "8 16", "", "0, 1"), name="N")
    assert [one.name for one in planned.runs] == [f"N-{method}-r{rank}-s{seed}" for seed in (0, 1)
                                                  for method in ("lora", "stella") for rank in (8, 16)]
    assert [sweep.row(one.preset) for one in planned.runs[:3]] == [
        ("lora", 8, 2e-4, 0), ("lora", 16, 2e-4, 0), ("stella", 8, 1e-3, 0)]
    assert sweep.shape(planned) == "8 runs: 2 methods × 2 ranks × 2 seeds" and planned.seconds is None
    assert planned.remarks == ["with fewer than 3 seeds the noise between seeds is not known, and a small difference "
                               "cannot be told from it"]


def test_rates_are_numbers_or_multiples_of_the_methods_own(tmp_path, preset):
    planned = sweep.plan(tmp_path, preset, Choice(("lora", "stella"), (), ("5e-4", "x2"), (0,)), ["train.steps=7"])
    assert [(one.name, one.preset.train.lr) for one in planned.runs] == [
        ("style-compared-lora-r16-lr5e-4-s0", 5e-4), ("style-compared-lora-r16-lrx2-s0", 4e-4),
        ("style-compared-stella-r16-lr5e-4-s0", 5e-4), ("style-compared-stella-r16-lrx2-s0", 2e-3)]
    assert {one.preset.train.steps for one in planned.runs} == {7}


def test_only_what_varies_differs_and_each_runs_preset_reads_back(tmp_path, preset):
    planned = sweep.plan(tmp_path, preset, Choice(("lora", "stiefel"), (), (), (5,)))
    one, other = ({(section, key): value for section, values in tomllib.loads(presets.dumps(run.preset)).items()
                   if isinstance(values, dict) for key, value in values.items()} for run in planned.runs)
    differing = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    assert differing == {("adapter", "method"), ("train", "lr"), ("train", "optimizer"), ("train", "momentum")}


def test_a_start_queues_all_and_writes_down_that_they_belong_together(tmp_path, preset):
    planned = sweep.plan(tmp_path, preset, Choice(("lora", "stella")), name="first")
    sweep.start(tmp_path, planned)
    assert [entry.name for entry in Queue(tmp_path).waiting()] == ["first-lora-r16-s0", "first-stella-r16-s0"]
    [comparison] = sweep.listing(tmp_path)
    assert (comparison.name, comparison.preset) == ("first", "style")
    assert comparison.runs == ["first-lora-r16-s0", "first-stella-r16-s0"]
    with pytest.raises(UserError, match="already a comparison called 'first'"):
        sweep.plan(tmp_path, preset, Choice(("lora",)), name="first")
    assert sweep.plan(tmp_path, preset, Choice()).name == "style-compared"
    (tmp_path / "comparisons/bad.json").write_text('{"runs": 7}')
    (tmp_path / "comparisons/hostile.json").write_text(json.dumps({"made": 1, "preset": "p", "runs": ["../x", "ok"]}))
    assert {one.name: one.runs for one in sweep.listing(tmp_path)}["hostile"] == ["ok"]


def test_all_faults_are_told_at_once_and_nothing_is_queued(tmp_path, preset):
    with pytest.raises(UserError) as told:
        sweep.plan(tmp_path, preset, Choice(("lora", "lorra"), (8, 0)))
    lines = str(told.value).splitlines()
    assert len(lines) == 2 and lines[0].startswith("rank 0: ") and lines[1].startswith("method lorra: ")
    assert "Did you mean lora?" in lines[1]
    for words, reason in ((("", "a", "", ""), "rank a: write whole numbers"), (("", "", "", "-1"), "seed -1"),
                          (("", "", "fast", ""), "learning rate fast")):
        with pytest.raises(UserError, match=reason):
            sweep.parse(*words)
    with pytest.raises(UserError, match="rank=4: give it as --ranks"):
        sweep.plan(tmp_path, preset, Choice(), ["adapter.rank=4"])
    with pytest.raises(UserError, match="would be made more than once"):
        sweep.plan(tmp_path, preset, Choice(("lora", "lora")))
    with pytest.raises(UserError, match="at most 200"):
        sweep.plan(tmp_path, preset, Choice((), (), (), tuple(range(201))))
    finished(tmp_path, "N-lora-r8-s0")
    with pytest.raises(UserError, match="already runs called N-lora-r8-s0"):
        sweep.plan(tmp_path, preset, Choice(("lora",), (8,)), name="N")


def test_the_time_is_told_from_runs_that_were_measured(tmp_path, preset):
    choice = Choice(("lora", "stella"), (), (), (0, 1, 2))
    known = presets.load(preset, ['adapter.method="lora"'])
    from trainer import speed

    speed._add(tmp_path, known, "CUDA card", sec=0.5)
    planned = sweep.plan(tmp_path, preset, choice)
    assert planned.seconds == pytest.approx(6 * 100 * 0.5) and planned.known == 3 and planned.remarks == []
    speed._add(tmp_path, presets.load(preset, ['adapter.method="stella"']), "CUDA card", sec=1.0)
    assert sweep.plan(tmp_path, preset, choice).seconds == pytest.approx(300 * 1.5)


def test_the_same_seed_gives_every_method_the_same_images_captions_and_noise(tiny_project, tmp_path):
    """What makes runs of one seed a pair."""
    seen = []
    for name, overrides in (("a", ['adapter.method="lora"']), ("b", ['adapter.method="stella"', "adapter.rank=2"]),
                            ("c", ['adapter.method="lora"', "train.seed=1"])):
        session = open_session(tiny_project, tmp_path, *overrides, name=name)
        draws = [draw for step in range(6) for draw in session.order.batch(step)]
        texts = [session.captions[draw.item][draw.caption] for draw in draws]
        noise, timesteps = session.objective.draw(noise_seeds(draws, session.preset.train.seed), (4, 8, 8),
                                                  session.device, torch.float32)
        seen.append((draws, texts, noise.tolist(), timesteps.tolist()))
    assert seen[0] == seen[1] and seen[0][0] != seen[2][0] and seen[0][2] != seen[2][2]


def test_the_shell_says_what_it_would_do_and_does_it(tmp_path, preset, trainer):
    words = ["sweep", "--preset", preset, "--methods", "lora,stella", "--seeds", "0,1,2", "--name", "N",
             "--workspace", tmp_path]
    with Queue(tmp_path).seat(""):  # so that nothing begins
        dry = trainer(*words, "--dry-run")
        assert dry.code == 0 and "N: 6 runs: 2 methods × 3 seeds, would be queued. How long" in dry.out, dry.err
        assert "N-stella-r16-s2  stella  16    0.001          2" in dry.out and Queue(tmp_path).waiting() == []
        done = trainer(*words, "--json")
        assert done.code == 0 and json.loads(done.out)["runs"][0] == ["N-lora-r16-s0", "lora", 16, 2e-4, 0], done.err
        assert len(Queue(tmp_path).waiting()) == 6
    for method, loss in (("lora", 0.2), ("stella", 0.1)):
        for seed in range(3):
            finished(tmp_path, f"N-{method}-r16-s{seed}", f'adapter.method="{method}"', f"train.seed={seed}",
                     validation=loss + seed)
    said = trainer("compare", "N", "--workspace", tmp_path).out
    assert "validation loss: stella is below lora by 0.1 (95 %: 0.1 to 0.1): significant (3 paired seeds)" in said
