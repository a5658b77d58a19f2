"""The page's arithmetic on rows, run by node: add, cut back, smooth, put side by side."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ASSETS = Path(__file__).parent.parent / "app" / "assets"
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def node(expression):
    """The value of an expression in JavaScript, with our arithmetic loaded."""
    script = (ASSETS / "series.js").read_text()
    program = f"{script}\nconst S = globalThis.Studio; console.log(JSON.stringify({expression}));"
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_rows_are_added_and_a_new_column_begins_with_nulls():
    assert node("S.append({step:[1], loss:[5]}, {step:[2], loss:[6], mean:[7]})") == {
        "step": [1, 2], "loss": [5, 6], "mean": [None, 7]}
    assert node("S.append({step:[1], loss:[5], n:[3]}, {step:[2], loss:[6]})")["n"] == [3, None]
    assert node("S.append({}, {step:[1], loss:[5]})") == {"step": [1], "loss": [5]}


def test_groups_of_columns_grow_together():
    added = node("S.append({step:[1], erank:{up:[3]}}, {step:[2], erank:{up:[4], mid:[2]}})")
    assert added == {"step": [1, 2], "erank": {"up": [3, 4], "mid": [None, 2]}}
    assert node("S.append({step:[1], erank:{up:[3]}}, {step:[2]})")["erank"] == {"up": [3, None]}


def test_many_rows_at_once_are_no_matter():
    assert node("S.append({step:[]}, {step: Array.from({length: 500000}, (_, i) => i)}).step.length") == 500_000


def test_a_rewind_cuts_all_columns():
    assert node("S.rewind({step:[1,2,3], loss:[4,5,6], erank:{up:[7,8,9]}}, 2)") == {
        "step": [1, 2], "loss": [4, 5], "erank": {"up": [7, 8]}}
    assert node("S.rewind({}, 2)") == {}


def test_smoothing_has_no_bias_at_the_start_and_passes_over_gaps():
    smooth = node("S.smooth({loss:[2,2,null,2]}, 0.9)")
    assert smooth == pytest.approx([2, 2, 2, 2])
    assert node("S.smooth({loss:[null,3]}, 0.9)") == [None, pytest.approx(3)]
    assert node("S.smooth({loss:[1,5]}, 0)") == [1, 5]


def test_a_thinned_row_weighs_as_much_as_the_rows_it_stands_for():
    whole = node("S.smooth({loss:[...Array(100).fill(1), ...Array(100).fill(3)]}, 0.98)")[-1]
    thin = node("S.smooth({loss:[0,9,1,5], mean:[1,1,3,3], n:[50,50,50,50]}, 0.98)")[-1]
    assert thin == pytest.approx(whole)


def test_series_with_steps_of_their_own_share_one_axis():
    assert node("S.align([[1,2,3],[10,20,30]], [[0,2],[7,8]])") == [
        [0, 1, 2, 3], [None, 10, 20, 30], [7, None, 8, None]]
    assert node("S.align([[],[]])") == [[], []]


def test_the_newest_value_is_the_last_that_is_there():
    assert node("[S.latest([1,null]), S.latest([null]), S.latest([1,2,3], 1), S.latest([])]") == [1, None, 2, None]


def test_intervals_that_overlap_tell_nothing_apart():
    assert node("[S.compareIntervals([1,2],[3,4]), S.compareIntervals([3,4],[1,2]), S.compareIntervals([1,3],[2,4]), "
                "S.compareIntervals([1,2],[undefined,4])]") == ["below", "above", "overlapping", "unknown"]


def test_a_long_curve_is_thinned_out_and_keeps_its_peaks_its_mean_and_its_count():
    made = "S.thin({step: Array.from({length: 9000}, (_, i) => i + 1), loss: Array.from({length: 9000}, (_, i) => " \
           "i === 4321 ? 50 : i % 7), lr: new Array(9000).fill(1), n: Array.from({length: 9000}, () => 2)}, 3000)"
    thin = node(made)
    assert len(thin["step"]) <= 3000 and thin["step"] == sorted(set(thin["step"])) and max(thin["loss"]) == 50
    assert sum(thin["n"]) == 18_000
    mean = sum(m * n for m, n in zip(thin["mean"], thin["n"])) / 18_000
    assert mean == pytest.approx(sum(50 if i == 4321 else i % 7 for i in range(9000)) / 9000)
    assert node("S.thin({step: [1, 2], loss: [1, null], lr: [1, 1]}, 3000)") == {
        "step": [1, 2], "loss": [1, None], "lr": [1, 1]}
    assert node("S.thin({}, 3000)") == {}
    gap = node("S.thin({step: [1, 2, 3, 4], loss: [null, null, 3, 5], lr: [1, 1, 1, 1]}, 2)")
    assert gap["loss"] == [3, 5] and gap["mean"] == [4, 4] and gap["n"] == [2, 2]


def test_noise_levels_are_means_over_the_samples_of_the_first_and_the_newest_tenth():
    row = "(value) => new Array(10).fill(value)"
    made = node("((row) => S.binMeans({step: [10, 20, 500, 1000], loss: [row(1), row(4), row(9), "
                f"[null, ...row(2).slice(1)]], count: [row(1), row(2), row(1), [0, ...row(5).slice(1)]]}}))({row})")
    assert made["first"] == [3] * 10 and made["newest"] == [None] + [2] * 9
    assert node("S.binMeans({})") == {"first": [None] * 10, "newest": [None] * 10}
