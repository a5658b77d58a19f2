"""The extractors compute what their originals do, refuse other files, and never fetch anything."""

import math

import pytest
import torch

from trainer.errors import UserError
from trainer.metrics import features, inception
from trainer.metrics.features import find_inception, load_extractor


@pytest.fixture(scope="module")
def efflite():
    return load_extractor("efflite0", "", "cpu")


def inception_state():
    """Seeded weights in the layout of the published file."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    state = {}
    for name, conv in inception.Inception().convs.items():
        n = conv.weight.shape[0]
        state[f"{name}.conv.weight"] = normal(*conv.weight.shape) * math.sqrt(2 / conv.weight[0].numel())
        state[f"{name}.bn.weight"] = torch.ones(n)
        state[f"{name}.bn.bias"] = 0.1 * normal(n)
        state[f"{name}.bn.running_mean"] = 0.1 * normal(n)
        state[f"{name}.bn.running_var"] = 0.5 + torch.rand(n, generator=generator)
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    return state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def state():
    return inception_state()


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """torch's cache, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def noise(*shape, seed=1):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_inception_gives_the_features_of_torch_fidelity(inception_file):
    """The numbers were computed by torch-fidelity 0.4.0 from this file and these pictures (at 299: no resizing)."""
    extractor = load_extractor("auto", str(inception_file), "cpu")
    assert (extractor.dim, extractor.resize) == (2048, "tf1-bilinear-299")
    generator = torch.Generator().manual_seed(1)
    small, _, exact = (torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
                       for shape in ((2, 128, 128, 3), (1, 64, 320, 3), (1, 299, 299, 3)))
    rows = extractor(small)
    assert rows.shape == (2, 2048) and rows.dtype == torch.float32
    torch.testing.assert_close(rows[0, :4], torch.tensor([1.2135410, 0.4111035, 1.8480551, 0.2468022]), rtol=1e-4,
                               atol=1e-4)
    assert rows.mean().item() == pytest.approx(1.2975661, rel=1e-4)
    row = extractor(exact)
    torch.testing.assert_close(row[0, :4], torch.tensor([1.6478645, 0.7003814, 2.6304822, 0.3509907]), rtol=1e-4,
                               atol=1e-4)


def test_inception_has_the_published_files_size(state):
    # beside the batch counts as many numbers as the 95.7 MB of the published file hold
    assert len(state) == 566
    assert sum(value.numel() for value in state.values()) == 23_885_392 + 94


def test_another_weights_file_is_named_by_its_hash(inception_file):
    extractor = load_extractor("inception", str(inception_file), "cpu")
    assert extractor.name.startswith("inception-") and "is not the published Inception file" in extractor.note


@pytest.mark.parametrize("damage, message", [
    (lambda s: s.pop("Mixed_7c.branch_pool.bn.bias"), "Mixed_7c.branch_pool.bn.bias is missing"),
    (lambda s: s.update({"AuxLogits.conv0.conv.weight": torch.zeros(1)}), "AuxLogits.conv0.conv.weight is not known"),
    (lambda s: s.update({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 5, 5)}),
     r"Conv2d_1a_3x3.conv.weight has shape \(32, 3, 5, 5\), not \(32, 3, 3, 3\)"),
])
def test_another_layout_is_refused(tmp_path, state, damage, message):
    changed = {key: value.expand(value.shape) for key, value in state.items()}
    damage(changed)
    torch.save(changed, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"w.pth does not have the layout of this extractor: {message}"):
        load_extractor("inception", str(tmp_path / "w.pth"), "cpu")


class Harmful:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize("content", [b"", b"not a pickle", None])
def test_a_file_that_is_no_weights_is_refused_and_not_run(tmp_path, capsys, content):
    path = tmp_path / "w.pth"
    torch.save({"x": Harmful()}, path) if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="w.pth is not a file of weights that can be read safely"):
        load_extractor("inception", str(path), "cpu")
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", features.INCEPTION_FILES)
def test_inception_is_found_under_both_names(torch_home, name):
    assert find_inception() is None
    (torch_home / name).touch()
    assert find_inception() == torch_home / name


def test_without_inception_auto_takes_efflite_and_says_what_to_fetch_and_where(torch_home):
    extractor = load_extractor("auto", "", "cpu")
    assert extractor.name == "efflite0"
    assert features.INCEPTION_URL in extractor.note and str(torch_home) in extractor.note
    with pytest.raises(UserError, match="its weights are not on this machine"):
        load_extractor("inception", "", "cpu")
    with pytest.raises(UserError, match="no file .*nowhere.pth"):
        load_extractor("auto", str(torch_home / "nowhere.pth"), "cpu")


def test_efflite_chosen_by_name_needs_no_note(efflite):
    assert (efflite.name, efflite.dim, efflite.note) == ("efflite0", 1280, None)
    assert efflite.resize == "bicubic-antialias-224"


def test_efflite_knows_real_classes(efflite):
    """To ImageNet's own head, which is in the file, a red disc on white is a ping-pong ball or a balloon."""
    weights = torch.load(features._efflite_file(), weights_only=True)
    grid = torch.arange(224) - 112
    disc = (grid[:, None] ** 2 + grid[None] ** 2 < 80**2)[..., None]
    picture = torch.where(disc, torch.tensor([200, 30, 30]), torch.tensor([250, 250, 250])).to(torch.uint8)
    logits = efflite(picture[None]) @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert {722, 417} <= set(logits.topk(5).indices[0].tolist())


def test_features_repeat_and_follow_the_picture(efflite):
    pictures = noise(3, 64, 64, 3)
    first = efflite(pictures)
    assert first.shape == (3, 1280) and first.dtype == torch.float32 and first.isfinite().all()
    assert torch.equal(first, efflite(pictures))
    torch.testing.assert_close(first[1:2], efflite(pictures[1:2]), rtol=1e-4, atol=1e-4)

    def cosine(a, b):
        return torch.cosine_similarity(efflite(a), efflite(b)).item()

    smooth = torch.nn.functional.interpolate(noise(2, 4, 4, 3).permute(0, 3, 1, 2).float(), (64, 64), mode="bicubic")
    one, other = (picture[None].permute(0, 2, 3, 1).clamp(0, 255).to(torch.uint8) for picture in smooth)
    nearly = (one.int() + 2).clamp(0, 255).to(torch.uint8)
    assert cosine(one, nearly) > 0.98 > cosine(one, other)


def test_pictures_of_any_sizes_are_taken_in_batches(efflite):
    pictures = [noise(32, 32, 3, seed=i) for i in range(3)] + [noise(40, 24, 3)] + [noise(32, 32, 3, seed=9)]
    rows = efflite.of(pictures, batch_size=2)
    torch.testing.assert_close(rows, torch.cat([efflite(p[None]) for p in pictures]), rtol=1e-4, atol=1e-4)
    assert efflite.of([]).shape == (0, 1280)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 8, 8, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
                                   torch.zeros(8, 8, 3, dtype=torch.uint8)])
def test_anything_but_pictures_is_refused(efflite, wrong):
    with pytest.raises(ValueError, match="pictures are uint8"):
        efflite(wrong)


def test_tensorflows_resize_takes_the_corner_and_no_half_pixels():
    x = torch.tensor([[0.0, 10.0], [20.0, 30.0]])[None, None]
    expected = torch.tensor([[0.0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30], [20, 25, 30, 30]])
    assert torch.equal(inception.resize(x, 4)[0, 0], expected)
