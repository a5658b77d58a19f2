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
    assert finding.verdict == "significant" and (finding.best, finding.other) == ("a0 + a1 + a2", "b0 + b1 + b2")
    reach = 4.303 * 0.001 / 3**0.5  # Student's t with two degrees of freedom
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
