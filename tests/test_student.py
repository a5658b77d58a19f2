"""The t distribution against printed tables (two-sided points; Fisher & Yates, Table III)."""

import pytest

from trainer import student


@pytest.mark.parametrize(("confidence", "freedom", "point"), [
    (0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 3, 3.1824), (0.95, 4, 2.7764), (0.95, 10, 2.2281),
    (0.95, 15, 2.1314), (0.95, 30, 2.0423), (0.95, 120, 1.9799), (0.99, 1, 63.6567), (0.99, 2, 9.9248),
    (0.99, 5, 4.0321), (0.90, 7, 1.8946), (0.50, 2, 0.8165), (0.999, 9, 4.7809), (0.975, 2, 6.2053)])
def test_points_of_the_table(confidence, freedom, point):
    assert student.quantile(confidence, freedom) == pytest.approx(point, abs=6e-5)
    assert student.within(point, freedom) == pytest.approx(confidence, abs=1e-5)


def test_many_degrees_of_freedom_come_to_the_normal_distribution():
    assert student.quantile(0.95, 100_000) == pytest.approx(1.95996, abs=1e-4)
    assert student.within(0.0, 3) == 0.0
