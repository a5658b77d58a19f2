"""Exact export and import of every method and start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tiny import METHODS, OPTIMIZER, adapted, batch, train, trained
from trainer import manifold
from trainer.adapters import Adapter
from trainer.errors import UserError
from trainer.optim import build_optimizer

STARTS = [("lora", "default"), ("lora", "pissa"), ("lora", "olora"), ("stiefel", "default"),
          *[(method, init) for method in ("stella", "trilora")
            for init in ("random", "zero", "pseudo-zero", "svd-major", "svd-minor")]]


def exported(adapter: Adapter, weights: str = "raw") -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    return {name: (up, down, magnitude) for name, up, down, magnitude in adapter.pairs(weights)}


def product(pair: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    return pair[0].flatten(1).double() @ pair[1].flatten(1).double()


@pytest.mark.parametrize("method, init, diagonal", [
    *[(method, init, False) for method, init in STARTS],
    *[(method, init, True) for method, init in STARTS if method in ("stella", "trilora")]])
def test_the_export_is_the_live_change_of_weight(method, init, diagonal):
    net, adapter = trained(method, init=init, diagonal_s=diagonal)
    adapter.refresh()
    outputs = [target.module(torch.eye(target.columns)) - target.module.base_forward(torch.eye(target.columns))
               for target in adapter.layout.targets if not target.convolution]
    linears = [target.name for target in adapter.layout.targets if not target.convolution]
    for name, pair in exported(adapter).items():
        live = adapter.delta(name)
        assert (product(pair) - live).norm() <= 1e-6 * live.norm()
        if name in linears:
            assert (product(pair).t() - outputs[linears.index(name)]).abs().max() <= 2e-6


def test_convolutions_come_as_kernels():
    up, down, magnitude = exported(trained("stella", dora=True)[1])["net.conv"]
    assert (up.shape, down.shape, magnitude.shape) == ((8, 3, 1, 1), (3, 6, 3, 3), (1, 6, 1, 1))
    up, down, magnitude = exported(trained("stella", dora=True)[1])["net.first"]
    assert (up.shape, down.shape, magnitude.shape) == ((10, 3), (3, 72), (1, 72))


@pytest.mark.parametrize("init, rank", [("pseudo-zero", 6), ("random", 3)])
def test_a_subtracted_start_is_exported_at_twice_the_rank(init, rank):
    net, adapter = adapted("stella", init=init)
    assert exported(adapter)["net.first"][0].shape == (10, rank)
    assert (adapter.delta("net.first").abs().max() <= 1e-12) == (init == "pseudo-zero")


def test_an_export_is_not_a_view_of_the_live_weights():
    net, adapter = trained("lora")
    before = exported(adapter)
    copies = {name: pair[0].clone() for name, pair in before.items()}
    train(net, adapter, build_optimizer("adamw", adapter, lr=1e-2), range(2))
    assert all(torch.equal(before[name][0], copies[name]) for name in copies)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("source", ["lora", "stella"])
@pytest.mark.parametrize("method", METHODS)
def test_import_of_an_export_gives_the_same_change(method, source, dora, diagonal):
    pairs = exported(trained(source, 8, dora=dora)[1])
    net, adapter = adapted(method, dora=dora, diagonal_s=diagonal, ema_decay=0.9)
    adapter.load_pairs(pairs)
    for weights in ("raw", "ema"):
        again = exported(adapter, weights)
        for name, pair in pairs.items():
            assert (product(again[name]) - product(pair)).norm() <= 1e-6 * product(pair).norm()
            assert not dora or torch.equal(again[name][2], pair[2])
    for leaf in adapter.on_manifold().values():
        assert manifold.orthogonality_error(leaf) <= 1e-6
    first = train(net, adapter, build_optimizer(OPTIMIZER[method], adapter, lr=1e-2), range(1))
    assert train(net, adapter, build_optimizer(OPTIMIZER[method], adapter, lr=1e-2), range(1, 30)) < first


@pytest.mark.parametrize("method", METHODS)
def test_a_lower_rank_is_imported_exactly_and_can_grow(method):
    pairs = exported(trained("lora", 8, rank=2)[1])
    net, adapter = adapted(method, rank=5)
    adapter.load_pairs(pairs)
    for name, pair in pairs.items():
        assert (product(exported(adapter)[name]) - product(pair)).norm() <= 1e-6 * product(pair).norm()
    train(net, adapter, build_optimizer(OPTIMIZER[method], adapter, lr=1e-2), range(10))
    assert torch.linalg.matrix_rank(adapter.delta("net.first"), rtol=1e-6) > 2


@pytest.mark.parametrize("method", METHODS)
def test_a_higher_rank_is_cut_to_the_best_approximation(method):
    pairs = exported(trained("stella", 8, rank=5)[1])
    adapter = adapted(method, rank=2)[1]
    adapter.load_pairs(pairs)
    for name, pair in pairs.items():
        left, values, right = torch.linalg.svd(product(pair), full_matrices=False)
        best = left[:, :2] * values[:2] @ right[:2]
        assert (adapter.delta(name) - best).norm() <= 1e-5 * best.norm()


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_a_file_lacks_start_without_change(method):
    pairs = exported(trained("lora", 8)[1])
    del pairs["net.second"]
    adapter = adapted(method, init="default")[1]
    adapter.load_pairs(pairs)
    assert adapter.delta("net.second").abs().max() == 0


def test_an_import_drops_a_subtracted_start():
    pairs = exported(trained("lora", 8)[1])
    adapter = adapted("stella", init="pseudo-zero")[1]
    adapter.load_pairs(pairs)
    assert exported(adapter)["net.first"][0].shape == (10, 3)
    assert (adapter.delta("net.first") - product(pairs["net.first"])).norm() <= 1e-6


def test_files_that_do_not_fit_are_plain_errors():
    pairs = exported(trained("lora", dora=True)[1])
    adapter = adapted("lora")[1]
    with pytest.raises(UserError, match="set adapter.dora = true"):
        adapter.load_pairs(pairs)
    plain = {name: (up, down, None) for name, (up, down, _) in pairs.items()}
    with pytest.raises(UserError, match="such as net.other"):
        adapter.load_pairs(plain | {"net.other": plain["net.first"]})
    with pytest.raises(UserError, match="does not fit net.first"):
        adapter.load_pairs(plain | {"net.first": plain["net.second"]})


def test_dora_starts_from_an_import_without_magnitudes_unchanged():
    pairs = {name: (up, down, None) for name, (up, down, _) in exported(trained("lora", 8)[1]).items()}
    nets = []
    for dora in (False, True):
        net, adapter = adapted("lora", dora=dora)
        adapter.load_pairs(pairs)
        adapter.refresh()
        nets.append(net(batch(1)))
    assert torch.allclose(*nets, atol=1e-5)


def test_a_pruned_adapter_is_exported_at_the_highest_rank_a_layer_kept():
    net, adapter = trained("stella", 8, diagonal_s=True, rank=5, ema_decay=0.9)
    adapter.prune(2)
    kept = (~adapter.pruned).sum(1)
    assert int(kept.sum()) == 8 and kept.min() >= 1
    pairs = exported(adapter)
    assert {pair[0].shape[1] for pair in pairs.values()} == {int(kept.max())}
    for name, pair in pairs.items():
        assert (product(pair) - adapter.delta(name)).norm() <= 1e-6 * adapter.delta(name).norm()
    for name, pair in exported(adapter, "ema").items():
        assert (product(pair) - adapter.delta(name, "ema")).norm() <= 1e-6 * adapter.delta(name, "ema").norm()
    train(net, adapter, build_optimizer("adamw", adapter, lr=1e-2), range(5))
    assert torch.equal((adapter.leaves["core"] == 0), adapter.pruned)
