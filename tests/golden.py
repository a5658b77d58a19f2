"""Replays recorded training traces of the published methods: `python -m tests.golden FILE…` prints the worst errors.

The layout is that of the files in tests/golden: sizes, rank, alpha, rates and steps all come from the file itself.
Every case runs free: only the start, the inputs and the targets of its little network are taken from the trace.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.adapters import Adapter, Target, build
from trainer.optim import build_optimizer, set_lr

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


@dataclass
class Case:
    """One trace: its settings and its tensors, by the name that follows the case's."""

    name: str
    settings: dict
    tensors: dict[str, Tensor]

    @property
    def stella(self) -> bool:
        return any(key.endswith(".Vt") for key in self.tensors)

    @property
    def rates(self) -> list[float]:
        steps = sum(key.startswith("step") and key.endswith("/x") for key in self.tensors)
        return self.settings.get("lrs") or [self.settings["lr"]] * steps

    @property
    def rank(self) -> int:
        return self.settings.get("r") or self.settings["rank"]

    @property
    def scale(self) -> float:
        root = 0.5 if self.settings.get("config", {}).get("use_rslora") else 1.0
        return self.settings["alpha"] / self.rank**root

    @property
    def layers(self) -> list[str]:
        """fc1, fc2, … of a StelLA trace; a Stiefel trace has one layer without a name."""
        names = {key.removeprefix("init/").split(".")[0] for key in self.tensors if key.startswith("init/")}
        return sorted(names, key=lambda name: int(name.strip("fc") or 0)) if self.stella else ["fc"]

    @property
    def dtype(self) -> torch.dtype:
        return next(tensor.dtype for key, tensor in self.tensors.items() if key.startswith("init/"))

    @property
    def judged(self) -> bool:
        """v2 of the Stiefel optimizer is another method, which does not stay on the manifold."""
        return not self.name.startswith("v2_")


def read_cases(file: Path) -> list[Case]:
    with safe_open(file, "pt") as trace:
        settings, tensors = trace.metadata(), {key: trace.get_tensor(key) for key in trace.keys()}
    names = sorted({key.split("/")[0] for key in tensors})
    return [Case(name, json.loads(settings[name]),
                 {key.removeprefix(name + "/"): value for key, value in tensors.items() if key.startswith(name + "/")})
            for name in names]


class Net(nn.Module):
    """Linears with tanh between. The adapter's scale is 1; the trace's s enters as (W/s)(s x) + bias.

    DoRA divides by the norm of (W/s + delta) and so brings s by itself.
    """

    def __init__(self, case: Case, rescale_input: bool) -> None:
        super().__init__()
        self.factor = case.scale if rescale_input else 1.0
        for layer in case.layers:
            base = f"base/{layer}." if case.stella else "base/"
            weight = case.tensors[base + "weight"]
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=base + "bias" in case.tensors, dtype=weight.dtype)
            linear.weight.data = weight / case.scale
            if linear.bias is not None:
                linear.bias.data = case.tensors[base + "bias"].clone()
            setattr(self, layer, linear)
        self.layers = case.layers

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = getattr(self, layer)((torch.tanh(x) if number else x) * self.factor)
        return x


def replay(case: Case) -> dict[str, float]:
    """Largest difference from the trace (see `_difference`), for parameters, losses and final weights."""
    layers, rank = case.layers, case.rank
    net = Net(case, rescale_input=not case.settings.get("dora"))
    targets = [Target(layer, getattr(net, layer), "all") for layer in layers]
    adapter, optimizer = (_stella if case.stella else _stiefel)(case, targets, rank)
    adapter.install()
    errors = {"parameters": 0.0, "loss": 0.0, "final": 0.0}
    for step, rate in enumerate(case.rates):
        set_lr(optimizer, rate)
        loss = _train_step(adapter, optimizer, net, case.tensors[f"step{step}/x"], case.tensors[f"step{step}/y"])
        errors["loss"] = max(errors["loss"], _difference(loss, case.tensors[f"step{step}/loss"]))
        errors["parameters"] = max(errors["parameters"], _compare(case, adapter, layers, f"step{step}/param/"))
    for layer in layers if case.stella else ():
        ours = adapter.delta(layer) * case.scale
        theirs = case.tensors[f"final/{layer}.delta_weight"]
        errors["final"] = max(errors["final"], _difference(ours, theirs))
    return errors


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Absolute for numbers up to 1, as factors are; relative to the largest beyond."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1.0))


def _train_step(adapter: Adapter, optimizer: Optimizer, net: Net, x: Tensor, y: Tensor) -> Tensor:
    adapter.refresh("raw", x.dtype)
    loss = (net(x) - y).square().mean()
    loss.backward()
    adapter.begin_step()
    adapter.guard(loss)
    adapter.before_step()
    optimizer.step()
    adapter.after_step()
    adapter.zero_grad()
    return loss.detach().double()


def _stella(case: Case, targets: list[Target], rank: int) -> tuple[Adapter, Optimizer]:
    config, diagonal = case.settings["config"], case.tensors[f"init/{targets[0].name}.S"].ndim == 1
    scaling = config.get("stella_grad_scaling", False)
    if scaling is True:
        scaling = float(case.settings["hidden_size"])
    scale_dim = scaling if isinstance(scaling, float) else 0.0  # the published code takes an int for "off"
    retraction = {"polar": "polar", "exp_map": "exponential"}[config.get("stella_retraction", "polar")]
    adapter = build(targets, method="stella", rank=rank, diagonal_s=diagonal, retraction=retraction,
                    scale_dim=scale_dim, dtype=case.dtype)
    for layer, parts in _parts(adapter, [target.name for target in targets]).items():
        for part, tensor in parts.items():
            tensor.data.copy_(case.tensors[f"init/{layer}.{part}"])
    name = {"adamw": "adamw", "sgdm": "sgd", "sgd": "sgd"}[case.settings["optimizer"]]
    return adapter, build_optimizer(name, adapter, lr=case.rates[0], weight_decay=case.settings["wd_on_S"],
                                    betas=tuple(case.settings.get("betas", (0.9, 0.999))),
                                    momentum=case.settings.get("momentum"))


def _stiefel(case: Case, targets: list[Target], rank: int) -> tuple[Adapter, Optimizer]:
    options = case.settings["optimizer_kwargs"]
    adapter = build(targets, method="stiefel", rank=rank, dora=bool(case.settings.get("dora")), dtype=case.dtype)
    for part, tensor in _parts(adapter, ["fc"])["fc"].items():
        tensor.data.copy_(case.tensors[f"init/{part}"])
    return adapter, build_optimizer(
        "stiefel", adapter, lr=case.rates[0], weight_decay=options.get("weight_decay", 0.0),
        momentum=options.get("momentum"), cautious=options.get("cautious_wd", False),
        gradient_weight=options.get("alpha_grad", 1.0) if options.get("Simplified_AdEMAMix") else None)


def _parts(adapter: Adapter, layers: list[str]) -> dict[str, dict[str, Tensor]]:
    """Views of each layer's parameters under the trace's names."""
    leaves, layout, method = {key: leaf.data for key, leaf in adapter.leaves.items()}, adapter.layout, adapter.method
    parts: dict[str, dict[str, Tensor]] = {}
    for number, layer in enumerate(layers):
        if "core" in leaves:
            factors = method.factors(leaves)
            parts[layer] = {"U": layout.slot(factors, "up", number), "Vt": layout.slot(factors, "down", number).t(),
                            "S": layout.slot(method.cores(leaves), "up", number)}
            continue
        parts[layer] = {"B": layout.slot(leaves, "up", number), "A": layout.slot(leaves, "down", number).t()}
        if adapter.magnitude is not None:
            parts[layer]["dora_scale"] = leaves[f"magnitude.{layout.targets[number].inputs}"]
    return parts


def _compare(case: Case, adapter: Adapter, layers: list[str], prefix: str) -> float:
    worst = 0.0
    for layer, parts in _parts(adapter, layers).items():
        for part, ours in parts.items():
            theirs = case.tensors[prefix + (f"{layer}.{part}" if case.stella else part)]
            worst = max(worst, _difference(ours, theirs))
    return worst


def main(files: list[str]) -> int:
    failed = False
    for file in files:
        for case in read_cases(Path(file)):
            errors, limit = replay(case), TOLERANCE[case.dtype]
            bad = case.judged and not max(errors.values()) <= limit
            failed |= bad
            verdict = "FAILED" if bad else "ok" if case.judged else "reference only: another method"
            print(f"{case.name:28s} " + "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
                  + f"  limit {limit:.0e}  {verdict}")
    return 1 if failed else 0


if __name__ == "__main__":
    own = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
    sys.exit(main(sys.argv[1:] or [str(file) for file in own]))
