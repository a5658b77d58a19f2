"""What benches say of several runs: a mean, and how sure it is."""

from __future__ import annotations

from tests.bench.paired import half_interval, spread


def test_a_mean_has_the_half_of_its_interval_where_there_are_several() -> None:
    assert half_interval([1.0, 2.0, 3.0]) == 4.30 / 3**0.5
    assert [spread([0.5]), spread([1.0, 2.0, 3.0])] == ["0.5000", "2.0000 ± 2.4826"]
    assert [spread([0.5], "+.5f"), spread((-1.0, 1.0), "+.2f")] == ["+0.50000", "+0.00 ± 12.71"]
