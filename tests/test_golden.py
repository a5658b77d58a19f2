"""The published traces, replayed to the last digit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import golden

FILES = [Path(golden.__file__).parent / "golden" / f"golden_{name}.safetensors" for name in ("stella", "stiefel")]
CASES = [case for file in FILES for case in golden.read_cases(file) if case.judged]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_published_traces_are_followed_to_the_last_digit(case):
    assert max(golden.replay(case).values()) <= golden.TOLERANCE[case.dtype]


def test_every_published_case_is_replayed():
    assert len([case for case in CASES if case.stella]) == 8
    assert len([case for case in CASES if case.name.startswith("v1_")]) == 6


def test_the_command_says_which_case_is_off(tmp_path, capsys):
    tensors = load_file(FILES[1])
    with safe_open(FILES[1], "pt") as trace:
        settings = trace.metadata()
    tensors["v1_mom0_wd0/step3/param/A"] += 1e-5 * torch.ones(())
    save_file(tensors, tmp_path / "off.safetensors", metadata=settings)
    assert golden.main([str(tmp_path / "off.safetensors")]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["v1_mom0_wd0"].endswith("FAILED")
    assert lines["v1_dora"].endswith("ok")


def own_stella_trace(folder: Path) -> Path:
    """A trace of other sizes, rank and scale, by a plain implementation with an SVD for every factor."""
    torch.manual_seed(1)
    sizes, rank, alpha, lr, decay, dim = [(31, 19), (22, 31)], 3, 7, 3e-3, 0.1, 26
    tensors, layers = {}, []
    for number, (m, n) in enumerate(sizes, 1):
        weight, bias = torch.randn(m, n).double() / n**0.5, torch.randn(m).double()
        u, v = (torch.linalg.qr(torch.randn(dim, rank).double())[0] for dim in (m, n))
        factors = {"U": u.contiguous(), "S": torch.eye(rank).double(), "Vt": v.t().contiguous()}
        tensors |= {f"c/base/fc{number}.weight": weight, f"c/base/fc{number}.bias": bias}
        tensors |= {f"c/init/fc{number}.{name}": factor.clone() for name, factor in factors.items()}
        layers.append((weight, bias, *(factor.requires_grad_() for factor in factors.values())))
    optimizer = torch.optim.AdamW([{"params": [u, vt], "weight_decay": 0.0} for _, _, u, _, vt in layers]
                                  + [{"params": [s], "weight_decay": decay} for _, _, _, s, _ in layers], lr=lr)
    for step in range(4):
        x, y = torch.randn(8, 19).double(), torch.randn(8, 22).double()
        out = x
        for number, (weight, bias, u, s, vt) in enumerate(layers):
            out = torch.tanh(out) if number else out
            out = torch.nn.functional.linear(out, weight + alpha / rank * u @ s @ vt, bias)
        loss = (out - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        tall = [(u, False) for _, _, u, _, _ in layers] + [(vt, True) for _, _, _, _, vt in layers]
        before = [(p.detach().t() if flip else p.detach()).clone() for p, flip in tall]
        for (p, flip), point in zip(tall, before):
            grad = p.grad.t() if flip else p.grad
            grad = grad - point @ (grad.t() @ point)
            p.grad = (grad.t() if flip else grad).contiguous()
        optimizer.step()
        for (p, flip), point in zip(tall, before):
            update = ((p.detach().t() if flip else p.detach()) - point) * (dim / len(point)) ** 0.5
            inner = point.t() @ update
            left, _, right = torch.linalg.svd(point + update - point @ (inner + inner.t()) / 2, full_matrices=False)
            p.data.copy_((left @ right).t() if flip else left @ right)
        tensors |= {f"c/step{step}/x": x, f"c/step{step}/y": y, f"c/step{step}/loss": loss.detach()[None]}
        for number, (_, _, u, s, vt) in enumerate(layers, 1):
            tensors |= {f"c/step{step}/param/fc{number}.{name}": p.detach().clone()
                        for name, p in (("U", u), ("S", s), ("Vt", vt))}
    tensors |= {f"c/final/fc{number}.delta_weight": (alpha / rank * u @ s @ vt).detach()
                for number, (_, _, u, s, vt) in enumerate(layers, 1)}
    settings = {"config": {"stella_diag_s": False, "stella_grad_scaling": float(dim)}, "optimizer": "adamw",
                "r": rank, "alpha": alpha, "lr": lr, "wd_on_S": decay, "steps": 4}
    save_file(tensors, folder / "own.safetensors", metadata={"c": json.dumps(settings)})
    return folder / "own.safetensors"


def test_a_trace_of_other_sizes_rank_and_scale_is_followed_too(tmp_path, capsys):
    assert golden.main([str(own_stella_trace(tmp_path))]) == 0
    assert "limit 1e-12  ok" in capsys.readouterr().out


def test_the_command_ends_with_0_or_1(tmp_path):
    tensors, off = load_file(FILES[1]), tmp_path / "off.safetensors"
    with safe_open(FILES[1], "pt") as trace:
        settings = trace.metadata()
    tensors["v1_dora/step5/param/B"] += 1e-4
    save_file(tensors, off, metadata=settings)
    for file, code in ((FILES[0], 0), (off, 1)):
        done = subprocess.run([sys.executable, "-m", "tests.golden", str(file)], capture_output=True, text=True,
                              cwd=Path(golden.__file__).parent.parent)
        assert done.returncode == code, done.stdout + done.stderr
