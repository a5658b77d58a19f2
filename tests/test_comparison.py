"""A difference counts only when it is larger than what seeds, or few pictures, do by themselves."""

import pytest

from tests.run_folders import finished
from trainer import comparison, facts


def collected(tmp_path, *runs):
    return [facts.collect(finished(tmp_path, name, *overrides, **measured)) for name, overrides, measured in runs]


def pair(tmp_path, gaps, spread=1.0):
    """Two ranks, some seeds each: the second's validation loss is higher by the gap of its seed."""
    runs = []
    for seed, gap in enumerate(gaps):
        base = 0.5 + spread * seed  # seeds differ by far more than the ranks do
        runs += [(f"a{seed}", [f"train.seed={seed}", "adapter.rank=4"], {"validation": base}),
                 (f"b{seed}", [f"train.seed={seed}", "adapter.rank=8"], {"validation": base + gap})]
    return collected(tmp_path, *runs)


def test_runs_that_differ_in_the_seed_alone_are_one_setting(tmp_path):
    known = pair(tmp_path, [0.1, 0.2])
    assert [[one.overview.name for one in group] for group in comparison.settings(known)] == [["a0", "a1"],
                                                                                             ["b0", "b1"]]


def test_a_small_gap_that_every_seed_shows_is_significant_and_has_an_interval(tmp_path):
    [finding] = comparison.compare(pair(tmp_path, [0.010, 0.011, 0.012]))
    assert finding.verdict == "significant" and (finding.best, finding.other) == ("rank 4", "rank 8")
    reach = 4.30265 * 0.001 / 3**0.5  # Student's t with two degrees of freedom
    assert finding.difference == pytest.approx(0.011)
    assert (finding.low, finding.high) == pytest.approx((0.011 - reach, 0.011 + reach))


def test_a_gap_that_changes_sign_between_seeds_is_noise(tmp_path):
    [finding] = comparison.compare(pair(tmp_path, [0.05, -0.04, 0.01]))
    assert finding.verdict == "noise" and finding.low < 0 < finding.high


def test_one_seed_or_no_shared_seed_tells_nothing(tmp_path):
    [finding] = comparison.compare(pair(tmp_path, [0.2]))
    assert finding.verdict == "unknown" and "one seed" in finding.why and finding.low is None
    known = collected(tmp_path, ("x", ["train.seed=8", "adapter.rank=4"], {"validation": 0.1}),
                      ("y", ["train.seed=9", "adapter.rank=8"], {"validation": 0.3}))
    [finding] = comparison.compare(known)
    assert finding.verdict == "unknown" and "no seed was used for both" in finding.why


def test_losses_over_other_images_are_not_compared(tmp_path):
    [finding] = comparison.compare(collected(
        tmp_path, ("a", ["evaluate.folder=one"], {"validation": 0.1}),
        ("b", ["evaluate.folder=two", "data.resolution=768"], {"validation": 0.2})))
    assert finding.verdict == "not comparable"
    assert finding.why == "measured with another data.resolution, evaluate.folder"


@pytest.mark.parametrize(("other", "verdict"), [((30.0, 20.0, 40.0), "noise"), ((60.0, 50.0, 70.0), "significant")])
def test_kid_is_judged_by_its_intervals(tmp_path, other, verdict):
    [finding] = comparison.compare(collected(tmp_path, ("b", ["adapter.rank=8"], {"kid": other}),
                                             ("a", ["adapter.rank=4"], {"kid": (20.0, 10.0, 30.0)})))
    assert (finding.measure, finding.best, finding.other, finding.verdict) == ("KID", "a", "b", verdict)
    assert finding.high - finding.difference == pytest.approx(200**0.5)


def test_kid_of_another_extractor_or_count_is_not_compared(tmp_path):
    known = collected(tmp_path, ("a", ["adapter.rank=4"], {"kid": (20.0, 10.0, 30.0)}),
                      ("b", ["adapter.rank=8"], {"kid": (60.0, 50.0, 70.0), "n_gen": 48}))
    [finding] = comparison.compare(known)
    assert finding.verdict == "not comparable" and finding.why == "measured with another n_gen"


def test_nothing_measured_gives_no_finding(tmp_path):
    assert comparison.compare(collected(tmp_path, ("a", [], {}), ("b", ["adapter.rank=8"], {"validation": 0.1}))) == []


def test_settings_are_named_by_what_sets_them_apart(tmp_path):
    def names(*runs):
        return [setting.name for setting in comparison.named(collected(tmp_path / str(len(runs)), *runs))]

    methods = [(f"c-{method}-r{rank}-s0", [f"adapter.method={method}", f"adapter.rank={rank}"], {})
               for method in ("lora", "stella") for rank in (4, 8)]
    assert names(*methods) == ["lora, rank 4", "lora, rank 8", "stella, rank 4", "stella, rank 8"]
    rates = [(f"x{lr}{seed}", [f"train.lr={lr}", f"train.seed={seed}"], {}) for lr in (1e-4, 2e-4) for seed in (0, 1)]
    assert names(*rates, ("other", ["train.lr=3e-4"], {})) == [
        "learning rate 0.0001", "learning rate 0.0002", "learning rate 0.0003"]
    assert names(("a", ["adapter.rank=4"], {}), ("b", ["adapter.rank=8"], {})) == ["a", "b"]
    assert names(("a", [], {}), ("b", ["train.seed=1"], {}), ("c", ["data.flip=true"], {})) == ["a + b", "c"]


def test_of_several_comparisons_each_interval_is_as_wide_as_all_of_them_ask_for(tmp_path):
    gaps = {4: [0.0, 0.0, 0.0], 8: [0.010, 0.011, 0.012], 16: [0.021, 0.02, 0.019]}
    findings = comparison.compare(collected(tmp_path, *(
        (f"r{rank}{seed}", [f"adapter.rank={rank}", f"train.seed={seed}"], {"validation": 0.5 + seed + gap})
        for rank, row in gaps.items() for seed, gap in enumerate(row))))
    assert [(finding.best, finding.other) for finding in findings] == [("rank 4", "rank 8"), ("rank 4", "rank 16")]
    reach = 6.2053 * 0.001 / 3**0.5  # t for 97.5 % with two degrees of freedom
    assert findings[0].high - findings[0].difference == pytest.approx(reach, rel=1e-4)
    assert findings[0].why == "3 paired seeds, one of 2 comparisons"


def test_kid_of_three_shared_seeds_is_judged_by_pairs(tmp_path):
    runs = [(f"{name}{seed}", [f"train.seed={seed}", f"adapter.rank={rank}"],
             {"kid": (base + gap, base + gap - 9, base + gap + 9)})
            for seed, base in enumerate((10.0, 60.0, 30.0)) for name, rank, gap in (("a", 4, 0.0), ("b", 8, 3 + seed))]
    [finding] = comparison.compare(collected(tmp_path, *runs))
    assert (finding.measure, finding.verdict, finding.why) == ("KID", "significant", "3 paired seeds")
    reach = 4.30265 / 3**0.5
    assert (finding.low, finding.high) == pytest.approx((4 - reach, 4 + reach), rel=1e-4)


def test_the_pairs_decide_which_one_is_below_when_each_has_seeds_of_its_own(tmp_path):
    [finding] = comparison.compare(collected(
        tmp_path, ("a0", ["adapter.rank=4"], {"validation": 0.5}),
        ("a1", ["adapter.rank=4", "train.seed=1"], {"validation": 0.6}),
        ("a2", ["adapter.rank=4", "train.seed=2"], {"validation": 0.1}),
        ("b0", ["adapter.rank=8"], {"validation": 0.4}),
        ("b1", ["adapter.rank=8", "train.seed=1"], {"validation": 0.5})))
    assert (finding.best, finding.other, finding.verdict) == ("rank 8", "rank 4", "significant")
    assert finding.difference == pytest.approx(0.1) and finding.low == pytest.approx(finding.high)


def test_a_run_that_goes_on_is_not_held_against_one_that_is_done(tmp_path):
    known = pair(tmp_path, [0.010, 0.011])
    late = finished(tmp_path, "b2", "train.seed=1", "adapter.rank=8", validation=1.9, steps=50)
    late.events.write_bytes(b"\n".join(late.events.read_bytes().split(b"\n")[:-2]) + b"\n")  # no end
    [finding] = comparison.compare([*known[:3], facts.collect(late)])
    assert finding.verdict == "unknown" and "not all of their runs are done" in finding.why


def test_a_kid_measured_earlier_is_not_held_against_that_of_a_run_that_is_done(tmp_path):
    early = finished(tmp_path, "early", "adapter.rank=4", kid=(20.0, 19.0, 21.0), steps=50)
    whole = finished(tmp_path, "whole", "adapter.rank=8", kid=(90.0, 89.0, 91.0))
    [finding] = comparison.compare([facts.collect(early), facts.collect(whole)])
    assert finding.verdict == "significant"  # both ended as they were meant to
    early.events.write_bytes(b"\n".join(early.events.read_bytes().split(b"\n")[:-2]) + b"\n")  # no end
    [finding] = comparison.compare([facts.collect(early), facts.collect(whole)])
    assert finding.verdict == "unknown" and "not all of their runs are done" in finding.why


def test_the_pareto_front_is_what_nothing_beats_in_both():
    points = [(1.0, 9.0), (2.0, 2.0), (3.0, 3.0), (9.0, 1.0), (2.0, 2.0)]
    assert comparison.front(points) == [True, True, False, True, True]
