"""The distances against torchmetrics, closed forms and simulations."""

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from trainer.errors import UserError
from trainer.metrics.distances import frechet, frechet_floor, kid, kid_interval, measure, nearest_cosine
from trainer.metrics.features import load_extractor


def gaussian(n, d=16, shift=0.0, seed=0, scale=1.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + shift


class Given(torch.nn.Module):
    """Hands features through, so that torchmetrics measures the same ones."""

    def __init__(self, d):
        super().__init__()
        self.num_features = d

    def forward(self, x):
        return x


class Pictures(torch.nn.Module):
    """Our extractor as torchmetrics takes one."""

    def __init__(self, extractor):
        super().__init__()
        self.extractor, self.num_features = extractor, extractor.dim

    def forward(self, x):  # b 3 h w, uint8
        return self.extractor(x.permute(0, 2, 3, 1))


def by_torchmetrics(metric, real, fake):
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()


@pytest.mark.parametrize("n, m, d", [(60, 40, 16), (12, 20, 48), (8, 90, 32)])
def test_frechet_is_that_of_torchmetrics(n, m, d):
    x, y = gaussian(n, d, seed=1), gaussian(m, d, shift=0.3, seed=2, scale=1.5)
    metric = FrechetInceptionDistance(feature=Given(d)).set_dtype(torch.float64)
    expected = by_torchmetrics(metric, x.double(), y.double())
    assert frechet(x, y) == pytest.approx(expected.item(), rel=1e-4)


def test_kid_is_that_of_torchmetrics():
    x, y = gaussian(30, seed=1), gaussian(30, shift=0.5, seed=2)
    metric = KernelInceptionDistance(feature=Given(16), subsets=1, subset_size=30)
    assert kid(x, y) == pytest.approx(by_torchmetrics(metric, x, y)[0].item(), rel=1e-4)


def test_our_extractor_inside_torchmetrics_gives_our_numbers():
    extractor = load_extractor("efflite0", "", "cpu")
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, top, (5, 3, 32, 32), generator=generator, dtype=torch.uint8) for top in (256, 128))
    x, y = (extractor(pictures.permute(0, 2, 3, 1)) for pictures in (real, fake))
    metric = KernelInceptionDistance(feature=Pictures(extractor), subsets=1, subset_size=5)
    assert kid(x, y) == pytest.approx(by_torchmetrics(metric, real, fake)[0].item(), rel=1e-3)


def test_frechet_of_a_shift_and_of_a_scale_has_its_closed_form():
    x = gaussian(40, seed=3).double()
    variance = x.var(0).sum().item()
    assert frechet(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet(x, x + 2.0) == pytest.approx(16 * 4.0)
    # same mean, standard deviations 1 and 3: tr(Σ)(1 + 9 − 2·3)
    assert frechet(x, (x - x.mean(0)) * 3.0 + x.mean(0)) == pytest.approx(4 * variance)
    assert frechet(x, x.flip(0)) == pytest.approx(0.0, abs=1e-9)


def test_kid_is_the_mean_over_pairs_of_different_pictures():
    x, y = gaussian(4, d=3, seed=4), gaussian(5, d=3, seed=5, shift=1.0)

    def k(a, b):
        return (float(a.double() @ b.double()) / 3 + 1) ** 3

    within_x = [k(x[i], x[j]) for i in range(4) for j in range(4) if i != j]
    within_y = [k(y[i], y[j]) for i in range(5) for j in range(5) if i != j]
    across = [k(a, b) for a in x for b in y]
    expected = sum(within_x) / 12 + sum(within_y) / 20 - 2 * sum(across) / 20
    assert kid(x, y) == pytest.approx(expected)


def test_the_interval_is_the_jackknife_by_definition():
    x, y = gaussian(7, seed=6), gaussian(9, seed=7, shift=0.2)
    variance = 0.0
    for values in ([kid(torch.cat([x[:i], x[i + 1:]]), y) for i in range(7)],
                   [kid(x, torch.cat([y[:j], y[j + 1:]])) for j in range(9)]):
        left_out = torch.tensor(values, dtype=torch.float64)
        variance += (len(values) - 1) / len(values) * (left_out - left_out.mean()).square().sum().item()
    estimate, low, high = kid_interval(x, y)
    assert estimate == kid(x, y)
    assert (estimate - low, high - estimate) == pytest.approx((1.96 * variance**0.5,) * 2)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_the_interval_covers_the_truth_about_95_times_in_100(shift):
    truth = 0.0 if shift == 0.0 else kid(gaussian(4000, seed=1), gaussian(4000, shift=shift, seed=2))
    trials = 200
    covered = 0
    for trial in range(trials):
        _, low, high = kid_interval(gaussian(24, seed=10 + trial), gaussian(48, shift=shift, seed=5000 + trial))
        covered += low <= truth <= high
    assert 0.90 <= covered / trials <= 1.0


def test_kid_of_one_distribution_scatters_around_zero_and_frechet_does_not():
    draws = [(gaussian(24, seed=2 * i), gaussian(24, seed=2 * i + 1)) for i in range(60)]
    kids = torch.tensor([kid(x, y) for x, y in draws])
    assert abs(kids.mean()) < 2 * kids.std() / 60**0.5
    assert min(frechet(x, y) for x, y in draws) > 1.0  # bias alone, as the floor shows


def test_the_floor_is_what_equal_sets_of_that_size_measure():
    reference = gaussian(400, seed=1)
    equal = sum(frechet(gaussian(24, seed=100 + i), gaussian(24, seed=200 + i)) for i in range(20)) / 20
    assert frechet_floor(reference, 24, seed=0) == pytest.approx(equal, rel=0.2)
    assert frechet_floor(reference, 24, seed=0) == frechet_floor(reference, 24, seed=0)
    assert frechet_floor(reference, 24, seed=0) > frechet_floor(reference, 150, seed=0)
    assert frechet_floor(reference[:48], 1000, seed=0) > 0.0  # halves of the reference at most


def test_a_memorised_training_set_looks_best_to_distances_and_is_caught_by_the_cosine():
    training, held_out, honest = gaussian(24, d=64, seed=1), gaussian(24, d=64, seed=2), gaussian(48, d=64, seed=3)
    copies = training.repeat(2, 1)
    assert kid(training, copies) < 0 and frechet(training, copies) < frechet(training, honest)
    assert frechet(held_out, copies) > frechet(training, copies)
    assert nearest_cosine(copies, training).min() > 0.999
    assert nearest_cosine(honest, training).max() < 0.97


def test_cosines_are_to_the_nearest_training_picture():
    training = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    generated = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, -1.0]])
    torch.testing.assert_close(nearest_cosine(generated, training), torch.tensor([1.0, 0.5**0.5, 0.0]).double())


def test_measure_fills_the_event_at_times_a_thousand():
    extractor = load_extractor("efflite0", "", "cpu")
    x, y = gaussian(48, seed=1), gaussian(24, shift=0.1, seed=2)
    event = measure(x, y, y[:5], extractor=extractor)
    assert set(event) == {"extractor", "resize", "kid", "kid_low", "kid_high", "fd", "fd_floor", "n_ref", "n_gen",
                          "nn_cosine"}
    assert event["kid"] == pytest.approx(1e3 * kid(x, y)) and event["kid_low"] < event["kid"] < event["kid_high"]
    assert (event["n_ref"], event["n_gen"], event["extractor"]) == (48, 24, "efflite0")
    assert event["fd"] == frechet(x, y) and event["fd_floor"] == frechet_floor(x, 24, seed=0)
    assert event["nn_cosine"] == pytest.approx(1.0) and measure(x, y, extractor=extractor)["nn_cosine"] is None


def test_too_few_pictures_are_a_users_error():
    with pytest.raises(UserError, match="KID needs at least 3 pictures a set, not 2 and 24"):
        kid_interval(gaussian(2), gaussian(24))
    with pytest.raises(UserError, match="at least 4 held-out pictures, not 3"):
        frechet_floor(gaussian(3), 24, seed=0)
    assert measure(gaussian(3), gaussian(5), extractor=load_extractor("efflite0", "", "cpu"))["fd_floor"] is None
