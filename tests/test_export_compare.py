"""Overlap of two LoRAs: principal angles and norms against full matrices, and the words for them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import lora_bases
from tests.test_export_resize import changes
from trainer.errors import UserError
from trainer.export.__main__ import main
from trainer.export.compare import as_words, compare, overlap
from trainer.export.writer import write

M, N = 40, 30
MODULE = "unet.mid_block.attentions.0.proj_in"


def basis(n, columns):
    return torch.linalg.qr(torch.randn(n, columns, dtype=torch.float64)).Q


def test_angles_are_those_between_the_spaces():
    """Two planes at a right angle in one direction and at 60 degrees in the other."""
    torch.manual_seed(0)
    u, v = basis(M, 4), basis(N, 4)
    tilted = torch.stack([v[:, 2], 0.5 * v[:, 1] + 0.75**0.5 * v[:, 3]], 1)
    found = overlap(("x", u[:, :2], v[:, :2].T, None), ("x", u[:, 1:3], tilted.T, None))
    assert found.ranks == (2, 2)
    assert found.angles[0] == pytest.approx([0.5, 0.0], abs=1e-9)
    assert found.angles[1] == pytest.approx([1.0, 0.0], abs=1e-9)
    assert found.into == pytest.approx(0.125) and found.out_of == pytest.approx(0.5)
    assert found.chance == pytest.approx((2 / M + 2 / N) / 2)


@pytest.mark.parametrize(("weight", "other"), [(1.0, 1.0), (0.5, -2.0)])
def test_numbers_are_those_of_the_full_matrices(weight, other):
    torch.manual_seed(0)
    pairs = [("x", torch.randn(M, r), torch.randn(r, N), None) for r in (5, 3)]
    a, b = ((pair[1] @ pair[2]).double() for pair in pairs)
    found = overlap(*pairs, weight, other)
    assert found.norms == pytest.approx((abs(weight) * float(a.norm()), abs(other) * float(b.norm())), rel=1e-5)
    cosine = float((a * b).sum() / a.norm() / b.norm()) * (1 if weight * other > 0 else -1)
    assert found.cosine == pytest.approx(cosine, abs=1e-6)
    assert found.together == pytest.approx(float((weight * a + other * b).norm()), rel=1e-5)
    p, q = basis_of(b), basis_of(b.T)
    assert found.shared == pytest.approx(float((p @ (p.T @ a @ q) @ q.T).norm() / a.norm()) ** 2, rel=1e-5)


def basis_of(matrix):
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, s > 1e-6 * s[0]]


def test_random_spaces_overlap_as_chance_has_it():
    torch.manual_seed(0)
    def pair(rank):
        return "x", torch.randn(M, rank), torch.randn(rank, N), None

    found = [overlap(pair(4), pair(6)) for _ in range(200)]
    for name, size in (("into", N), ("out_of", M)):
        assert sum(getattr(one, name) for one in found) / 200 == pytest.approx(6 / size, rel=0.05)


def files(path, *pairs, names=(MODULE, MODULE)):
    for name, module, (up, down) in zip("ab", names, pairs):
        write(path / f"{name}.safetensors", [(module, up, down, None)], family="sd15", dtype="fp32",
              metadata={"ss_base_model_version": "sd_v1"}, form="U1" if name == "a" else "U2")
    return path / "a.safetensors", path / "b.safetensors"


def test_words_tell_alike_opposite_and_apart(tmp_path):
    torch.manual_seed(0)
    u, v = basis(M, 4).float(), basis(N, 4).float()
    first, other = (u[:, :2], v[:, :2].T), (u[:, 2:], v[:, 2:].T)
    cases = {"They want much the same": first, "They hardly touch each other": other,
             "They work against each other": (-u[:, :2], v[:, :2].T),
             "in different ways": (u[:, :2], torch.stack([v[:, 1], -v[:, 0]]))}
    factors = {"They want much the same": 2.0, "They work against each other": 0.0}
    for text, second in cases.items():
        found = compare(files(tmp_path, first, second))
        words = " ".join(as_words(found))
        assert text in words
        assert found.together == pytest.approx(factors.get(text, 2**0.5) * 2**0.5, abs=1e-5)
        assert f"{factors.get(text, 2**0.5):.2f} times as much" in words
    assert "1.12 times" in as_words(compare(files(tmp_path, first, other), [1.0, 0.5]))[-1]


def test_layers_of_one_file_alone_are_named(tmp_path):
    pair = torch.ones(M, 1), torch.ones(1, N)
    found = compare(files(tmp_path, pair, pair, names=(MODULE, "unet.mid_block.attentions.0.proj_out")))
    assert found.layers == [] and found.alone == ([MODULE], ["unet.mid_block.attentions.0.proj_out"])
    assert found.together == pytest.approx((2 * M * N) ** 0.5)
    assert "0 layers are changed by both; 1 by a.safetensors alone" in as_words(found)[0]


@pytest.mark.parametrize(("model", "form"), [("sdxl", "U1"), ("klein", "F6"), ("flux1", "F5")])
def test_whole_files_of_different_formats(tmp_path, model, form):
    a = lora_bases.lora(tmp_path / "a.safetensors", model, ("all",))
    b = lora_bases.lora(tmp_path / "b.safetensors", model, ("attention",), form, seed=8)
    found = compare([a, b], [1.0, 0.7])
    one, two = changes(a), changes(b)
    both = {name: one[name] + 0.7 * two[name] if name in two else one[name] for name in one}
    assert {layer.layer for layer in found.layers} == {name for name in two if two[name].any()}
    total = float(sum(matrix.square().sum() for matrix in both.values())) ** 0.5
    assert found.together == pytest.approx(total, rel=1e-5)


def test_what_cannot_be_compared_is_refused(tmp_path):
    pair = torch.ones(M, 1), torch.ones(1, N)
    a, b = files(tmp_path, pair, (torch.ones(M + 1, 1), torch.ones(1, N)))
    with pytest.raises(UserError, match="is 40 x 30 in one file and 41 x 30 in the other"):
        compare([a, b])
    save_file({name: 0 * tensor for name, tensor in load_file(a).items()}, a)
    with pytest.raises(UserError, match="changes anything"):
        compare([a, a])
    with pytest.raises(UserError, match="compare takes two files"):
        compare([a])


def test_the_command_line_compares(tmp_path, capsys):
    torch.manual_seed(0)
    paths = [str(path) for path in files(tmp_path, *[(torch.randn(M, 2), torch.randn(2, N)) for _ in range(2)])]
    assert main(["compare", *paths]) == 0
    assert MODULE in (said := capsys.readouterr().out) and "1 layers are changed by both" in said
    assert main(["compare", *paths, "--weights", "1", "0.5", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["layers"][0]["ranks"] == [2, 2] and len(answer["words"]) == 3
