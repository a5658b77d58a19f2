"""Optimizers by name for a bank's leaves, learning-rate schedules, and clipping; none waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer import manifold
from trainer.adapters.bank import Adapter
from trainer.adapters.step_rule import ManifoldRule, PairPreconditioner
from trainer.errors import UserError

KEEP_OWN_WEIGHTS = ("prodigy", "schedulefree", "schedule-free", "adamwschedulefree", "prodigyschedulefree")


def build_optimizer(name: str, adapter: Adapter, *, lr: float, weight_decay: float = 0.0,
                    betas: tuple[float, float] = (0.9, 0.999), momentum: float | None = None,
                    cautious: bool = False, gradient_weight: float | None = None,
                    up_lr_ratio: float = 1.0) -> Optimizer:
    """An optimizer over the adapter's leaves, its state made at once; on a GPU `step` can be captured in a graph.

    name: adamw, adamw8bit (runs eagerly), sgd, scaled_adamw (lora only) or stiefel (Stiefel-LoRA only).
    weight_decay acts on free factors only. momentum: of sgd (0.9) and stiefel (0.95). cautious, gradient_weight:
    options of stiefel. up_lr_ratio: LoRA+ (Hayou et al. 2402.12354), the learning rate of `up` over that of `down`.
    Any but `stiefel` turns Stiefel-LoRA into the paper's plain form: A by this optimizer, B by it on the manifold with
    QR.
    Raises UserError for an optimizer that cannot go with the method.
    """
    _check(name, adapter, up_lr_ratio)
    if set(adapter.method.manifold) == {"up"} and name != "stiefel":
        adapter.step_rule = ManifoldRule(adapter.on_manifold().values(), "qr", 0.0)
    if name == "scaled_adamw":
        adapter.step_rule = PairPreconditioner(adapter.leaves, adapter.layout)
    groups = parameter_groups(adapter, lr, 0.0 if name == "stiefel" else weight_decay, up_lr_ratio)
    if name == "stiefel":
        return StiefelOptimizer(adapter, groups, weight_decay, 0.95 if momentum is None else momentum, cautious,
                                gradient_weight)
    if name == "adamw8bit":
        return _adamw8bit(groups, betas, adapter.skip)
    optimizer = _sgd(groups, momentum) if name == "sgd" else _adamw(groups, betas, adapter.skip.is_cuda)
    optimizer.found_inf = adapter.found_inf  # torch's fused kernels leave state and weights alone where it is 1
    return optimizer


def _check(name: str, adapter: Adapter, up_lr_ratio: float) -> None:
    constrained, kind = bool(adapter.method.manifold), type(adapter.method).__name__
    if name in KEEP_OWN_WEIGHTS and constrained:
        raise UserError(f"train.optimizer = {name!r} keeps its own copy of the weights, which would leave the manifold "
                        f"that {kind} needs: use adamw")
    if name not in ("adamw", "adamw8bit", "sgd", "scaled_adamw", "stiefel"):
        raise UserError(f"there is no optimizer {name!r}: choose adamw, adamw8bit, sgd, scaled_adamw or stiefel")
    if name == "stiefel" and kind != "StiefelLoRA":
        raise UserError("train.optimizer = 'stiefel' is the step of adapter.method = 'stiefel': use adamw")
    if (name == "scaled_adamw" or up_lr_ratio != 1.0) and kind != "LoRA":
        raise UserError("scaled_adamw and a learning-rate ratio go with adapter.method = 'lora' only")


def parameter_groups(adapter: Adapter, lr: float, weight_decay: float, up_lr_ratio: float) -> list[dict]:
    """One group a role; `lr` is a tensor on the device at a fixed address, `initial_lr` what weight decay refers to."""
    groups = []
    for role, leaves in adapter.parameters_by_role().items():
        decayed = role not in (*adapter.method.manifold, "magnitude")
        ratio = up_lr_ratio if role == "up" else 1.0
        initial = lr * ratio
        moved = [adapter.step_rule.moved(leaf) for leaf in leaves] if adapter.step_rule else leaves
        groups.append({"params": moved, "role": role, "initial_lr": initial, "ratio": ratio,
                       "lr": torch.tensor(initial, dtype=_lr_dtype(leaves[0]), device=leaves[0].device),
                       "weight_decay": weight_decay if decayed else 0.0})
    return groups


def _lr_dtype(leaf: Tensor) -> torch.dtype:
    return torch.float32 if leaf.is_cuda else torch.float64  # what torch's fused kernels read on each device


def _adamw(groups: list[dict], betas: tuple[float, float], on_gpu: bool) -> Optimizer:
    optimizer = AdamW(groups, betas=betas, fused=True, capturable=on_gpu)
    optimizer._warned_capturable_if_run_uncaptured = True  # the first steps run eagerly, as they should
    for group in groups:
        for leaf in group["params"]:  # made now: a first step that is skipped, or captured, finds them ready
            optimizer.state[leaf] = {"step": torch.zeros((), device=leaf.device),
                                     "exp_avg": torch.zeros_like(leaf), "exp_avg_sq": torch.zeros_like(leaf)}
    return optimizer


def _sgd(groups: list[dict], momentum: float | None) -> Optimizer:
    optimizer = SGD(groups, momentum=0.9 if momentum is None else momentum, fused=True)
    for group in groups:
        for leaf in group["params"]:
            optimizer.state[leaf]["momentum_buffer"] = torch.zeros_like(leaf)
    return optimizer


def check_packages(name: str) -> None:
    """Raise UserError when what an optimizer is made of cannot be loaded here."""
    if name == "adamw8bit":
        _bitsandbytes_adamw()


def _bitsandbytes_adamw() -> type[Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"train.optimizer = 'adamw8bit' needs the package bitsandbytes, which cannot be loaded here "
                        f"({error}): install it with `pip install bitsandbytes`, or use adamw") from error
    return AdamW8bit


def _adamw8bit(groups: list[dict], betas: tuple[float, float], skip: Tensor) -> Optimizer:
    AdamW8bit = _bitsandbytes_adamw()

    class EagerAdamW8bit(InPlaceState, AdamW8bit):
        """Knows no device flag, so it asks the host whether to skip; its step cannot be captured."""

        capturable_step = False

        def step(self) -> None:
            if not skip.item():
                super().step()

    return EagerAdamW8bit([group | {"lr": group["initial_lr"]} for group in groups], betas=betas)


class InPlaceState(Optimizer):
    """Saves an optimizer as flat tensors and restores them in place: no address changes, so a captured graph holds."""

    def state_dict(self) -> dict[str, Tensor]:
        """`<group>.<position>.<name>` -> tensor (not copies). Learning rates follow from the step."""
        tensors = {}
        for g, group in enumerate(self.param_groups):
            for p, leaf in enumerate(group["params"]):
                for name, value in self.state[leaf].items():
                    tensors[f"{g}.{p}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """To the bit; UserError if the state is of another optimizer or adapter."""
        own = self.state_dict()
        if own and {key: tensor.shape for key, tensor in own.items()} != {key: t.shape for key, t in tensors.items()}:
            raise UserError("the saved optimizer state is of another optimizer or adapter: "
                            "resume with the run's own preset")
        for key, saved in tensors.items():
            g, p, name = key.split(".")
            leaf = self.param_groups[int(g)]["params"][int(p)]
            if isinstance(self.state[leaf].get(name), Tensor):
                self.state[leaf][name].copy_(saved)
            else:  # bitsandbytes makes its state at the first step, and counts steps by a plain number
                self.state[leaf][name] = saved.item() if name == "step" else saved.to(leaf.device)


class AdamW(InPlaceState, torch.optim.AdamW):
    """torch's fused AdamW."""


class SGD(InPlaceState, torch.optim.SGD):
    """torch's fused SGD with momentum."""


class StiefelOptimizer(InPlaceState):
    """The step of Stiefel-LoRA: sign of the momentum for A, a projected step of fixed RMS and QR for B.

    Heavy-ball momentum M <- mu M + grad. A -= 0.2 lr sign(M), after weight decay by (wd / r) * (lr / initial lr),
    which `cautious` applies only where the step and A agree in sign. B: M projected onto the tangent space, scaled to
    RMS 0.2 lr, retracted by QR with positive diagonal. gradient_weight g takes M + g * grad as the direction
    (Simplified AdEMAMix). DoRA's magnitudes take the sign step without decay.

    B on the manifold by QR is Park et al. 2508.17901; signs, RMS 0.2 and wd / r are of adv_optm 2.3.dev3, Stiefel_LoRA
    (OneTrainer's pull request 1333). Cautious decay: Chen et al. 2510.12402; AdEMAMix so: Morwani et al. 2502.02431.
    """

    RMS = 0.2

    def __init__(self, adapter: Adapter, groups: list[dict], weight_decay: float, momentum: float, cautious: bool,
                 gradient_weight: float | None) -> None:
        super().__init__(groups, {})
        self.adapter, self.skip, self.rank = adapter, adapter.skip, adapter.layout.rank
        self.decay, self.momentum = weight_decay, momentum
        self.cautious, self.gradient_weight = cautious, gradient_weight
        for leaf in adapter.parameters():
            self.state[leaf]["momentum"] = torch.zeros_like(leaf)
        self.on_manifold = list(adapter.on_manifold().values())
        self.lengths = torch.cat([leaf.new_full((len(leaf), 1, 1), self.RMS * math.sqrt(leaf[0].numel()),
                                                dtype=torch.float64) for leaf in self.on_manifold])

    @torch.no_grad()
    def step(self) -> None:
        everything = [leaf for group in self.param_groups for leaf in group["params"]]
        self._fused(everything, [leaf.grad for leaf in everything], self._momenta(everything), lr=0.0)  # moves no leaf
        for group in self.param_groups:
            leaves, momenta = group["params"], self._momenta(group["params"])
            grads, directions = [leaf.grad for leaf in leaves], momenta
            if self.gradient_weight is not None:
                directions = [torch.where(self.skip, momentum, momentum + self.gradient_weight * grad)
                              for momentum, grad in zip(momenta, grads)]
            (self._turn if group["role"] == "up" else self._move)(leaves, directions, group)

    def _momenta(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        return [self.state[leaf]["momentum"] for leaf in leaves]

    def _fused(self, leaves: Sequence[Tensor], grads: Sequence[Tensor], momenta: Sequence[Tensor],
               lr: float | Tensor, weight_decay: float = 0.0) -> None:
        """M <- mu M + grad and leaf -= lr M; without momenta leaf -= lr (grad + weight_decay leaf). torch's kernel of
        SGD takes all leaves at once, and leaves them and M alone in a step that is skipped."""
        momentum = (self.momentum or torch.finfo(torch.float64).tiny) if momenta else 0.0  # with 0 it writes no M
        torch._fused_sgd_(leaves, grads, momenta, weight_decay=weight_decay, momentum=momentum, lr=lr, dampening=0.0,
                          nesterov=False, maximize=False, is_first_step=False, found_inf=self.adapter.found_inf)

    def _move(self, leaves: Sequence[Tensor], directions: Sequence[Tensor], group: dict) -> None:
        """A free factor: -= 0.2 lr (sign + decay leaf)."""
        signs = torch._foreach_sign(directions)
        decay = 0.0
        if self.decay and group["role"] != "magnitude":
            decay = self.decay / (self.rank * self.RMS * group["initial_lr"])
        if decay and self.cautious:
            for leaf, sign in zip(leaves, signs):
                sign.add_(leaf * (sign * leaf >= 0), alpha=decay)
        self._fused(leaves, signs, [], self.RMS * group["lr"], 0.0 if self.cautious else decay)

    def _turn(self, leaves: Sequence[Tensor], directions: Sequence[Tensor], group: dict) -> None:
        """The factor on the manifold: by a fixed length along the tangent part of -direction."""
        updates = manifold.side_by_side([partial(_downhill, leaf, direction)
                                         for leaf, direction in zip(leaves, directions)])
        manifold.advance_(leaves, updates, lambda norm: self.lengths * group["lr"] / norm.clamp_min(1e-12), "qr",
                          project=False, measure=self.adapter.measures, skip=self.skip)


def _downhill(x: Tensor, direction: Tensor) -> Tensor:
    """The tangent part of -direction, all [L, dim, r]."""
    with manifold.exact_arithmetic(x.device):
        inner = manifold.gram(x, direction)
        return torch.baddbmm(direction, x, inner + inner.mT, beta=-1, alpha=0.5)


# -- learning rate and clipping --------------------------------------------------------------------------------------


def build_schedule(name: str, steps: int, warmup: int = 0) -> Callable[[int], float]:
    """Factor of the learning rate at a step 0..steps-1: constant, cosine or linear (to 0), after a linear warm-up."""
    shapes = {"constant": lambda t: 1.0, "linear": lambda t: 1.0 - t,
              "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t))}
    if name not in shapes:
        raise UserError(f"there is no schedule {name!r}: choose constant, cosine or linear")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return shapes[name](min(1.0, (step - warmup) / max(1, steps - warmup)))

    return factor


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate, in place; groups with a ratio of their own (LoRA+) keep it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["ratio"])
        else:
            group["lr"] = lr * group["ratio"]


@torch.no_grad()
def clip_grad_norm(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """The 2-norm of all gradients, on the device; they are scaled down to max_norm (0: left alone)."""
    grads = [parameter.grad for parameter in parameters]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if max_norm > 0:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
