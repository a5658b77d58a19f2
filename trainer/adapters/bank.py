"""The bank: an adapter's stacked parameters, their gradients, averages and manifold, and the layers they feed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from trainer.adapters import dora, layer, state, transfer
from trainer.adapters.cast import cast
from trainer.adapters.layout import Layout
from trainer.adapters.lora import LoRA, Stacks
from trainer.adapters.stella import StelLA
from trainer.adapters.step_rule import StepRule
from trainer.adapters.target import Target
from trainer.manifold import orthonormalize, side_by_side

MEASURE_EVERY = 8  # steps; in between, rounding adds up to some 1e-7


class Adapter:
    """All adapted layers of a model as a handful of stacked leaves.

    leaves: what optimizers, clipping and all-reduce see; their addresses and those of their `.grad` never change.
    One optimizer step, none of it waiting for the device:

        adapter.begin_step()
        adapter.guard(loss, clip_grad_norm(adapter.parameters(), 1.0))
        adapter.before_step(); optimizer.step(); adapter.after_step(); adapter.ema_update(); adapter.zero_grad()
    """

    def __init__(self, layout: Layout, method: LoRA | StelLA, leaves: Stacks, frozen: Stacks | None,
                 magnitude: dora.Magnitude | None, dropout: float, ema_decay: float | None) -> None:
        self.layout, self.method, self.frozen, self.magnitude = layout, method, frozen, magnitude
        self.dropout, self.ema_decay = dropout, ema_decay
        device = next(iter(leaves.values())).device
        self.leaves = {key: leaf.requires_grad_() for key, leaf in leaves.items()}
        for leaf in self.leaves.values():
            leaf.grad = torch.zeros_like(leaf)
        self.step_rule: StepRule | None = None
        self.skip = torch.zeros((), dtype=torch.bool, device=device)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)  # the same, as torch's optimizers read it
        self.updates = torch.zeros((), dtype=torch.float32, device=device)  # steps taken, for the average's warm-up
        self.steps = torch.zeros((), dtype=torch.int64)  # steps begun, on the host
        self.measures = True  # whether this step measures how far rounding has taken the factors off the manifold
        core = self.leaves.get("core")  # with a diagonal S: which singular values were cut, [layers, r]
        self.pruned = torch.zeros_like(core, dtype=torch.bool) if core is not None and core.ndim == 2 else None
        with torch.no_grad():
            self.start = self._present_start()
            self.ema = {key: stack.clone() for key, stack in self._averaged().items()} if ema_decay else None

    # -- layers ----------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Route every target's forward through the fused function; the base model until the first `refresh`."""
        for target in self.layout.targets:
            layer.install(target, self.dropout)

    def remove(self) -> None:
        for target in self.layout.targets:
            layer.remove(target)

    def move(self, targets: Sequence[Target]) -> None:
        """Install over the same layers of a model that was loaded again; `remove` comes before."""
        self.layout.move(targets)
        self.install()

    def refresh(self, weights: str = "raw", dtype: torch.dtype = torch.float32) -> None:
        """Cast the stacks to the compute dtype and hand each layer its slices; once a micro-batch.

        weights: "raw" (with gradients where they are recorded), "ema", or "off" for the base model alone.
        """
        if weights == "off":
            for target in self.layout.targets:
                layer.switch(target, None, None, None)
            return
        stacks = self.pair_stacks(weights)
        copies = cast(stacks, dtype)
        downs, ups = self.layout.by_layer(copies, "down"), self.layout.by_layer(copies, "up")
        gains = [None] * len(ups)
        if self.magnitude is not None:
            gains = self.magnitude.gains(stacks, ups, self.values(weights))
        for target, down, up, gain in zip(self.layout.targets, downs, ups, gains):
            layer.switch(target, down, up, gain)

    def pair_stacks(self, weights: str = "raw") -> Stacks:
        """Stacks `up.<m>` [L, m, r'] and `down.<n>` [L, n, r'] of the exported pair, with the frozen start pair."""
        values = self.values(weights)
        pair = self.method.pair(values) if weights == "raw" else {key: values[key] for key in self.layout.pair_shapes()}
        if self.frozen is None:
            return pair
        return {key: torch.cat([stack, self.frozen[key]], dim=-1) for key, stack in pair.items()}

    def values(self, weights: str) -> Stacks:
        """Leaves ("raw"), or averaged pair and magnitudes ("ema")."""
        if weights == "raw":
            return self.leaves
        if weights != "ema" or self.ema is None:
            raise ValueError(f"this adapter keeps no {weights!r} weights")
        return self.ema

    # -- the step --------------------------------------------------------------------------------------------------

    def parameters(self) -> list[Tensor]:
        return list(self.leaves.values())

    def parameters_by_role(self) -> dict[str, list[Tensor]]:
        """Leaves by what they are: up, down, factor (on the manifold), core (S), magnitude (DoRA)."""
        roles: dict[str, list[Tensor]] = {}
        for key, leaf in self.leaves.items():
            roles.setdefault(key.split(".")[0], []).append(leaf)
        return roles

    def on_manifold(self) -> Stacks:
        """The leaves whose matrices are orthonormal."""
        return {key: leaf for key, leaf in self.leaves.items() if key.split(".")[0] in self.method.manifold}

    def zero_grad(self) -> None:
        torch._foreach_zero_([leaf.grad for leaf in self.leaves.values()])

    def begin_step(self) -> bool:
        """Count a step on the host; True if it measures and corrects what rounding did to the factors on the manifold.

        One step in MEASURE_EVERY does, the first among them: measuring takes as long as the retraction itself.
        """
        self.measures = int(self.steps) % MEASURE_EVERY == 0
        self.steps += 1
        return self.measures

    @torch.no_grad()
    def guard(self, *numbers: Tensor) -> None:
        """Skip the coming step, on the device, unless all numbers (loss, gradient norm) are finite.

        A skipped step leaves parameters, optimizer state and averages bit for bit as they were. With several
        processes pass numbers that are equal on all of them, such as the norm of the averaged gradients.
        """
        bad = torch.stack([number.detach().float() for number in numbers]).mul_(0.0).sum() != 0  # inf * 0 is NaN
        self.skip.copy_(bad)
        self.found_inf.copy_(bad)

    def before_step(self) -> None:
        """What the method asks before `optimizer.step()`, after clipping."""
        if self.step_rule is not None:
            self.step_rule.before()

    @torch.no_grad()
    def after_step(self) -> None:
        """What the method asks after `optimizer.step()`."""
        if self.step_rule is not None:
            self.step_rule.after(self.skip, self.measures)
        if self.pruned is not None:
            self.leaves["core"].masked_fill_(self.pruned, 0.0)

    @torch.no_grad()
    def prune(self, average_rank: float) -> None:
        """Cut the smallest singular values of a diagonal S, over all layers, down to an average rank; for good.

        Adaptive rank as AdaLoRA has it (Zhang et al. 2303.10512), by |sigma|; every layer keeps its largest. The budget
        of a step comes from `stella.rank_budget`.
        """
        size = self.leaves["core"].abs().masked_fill(self.pruned, -1.0)
        size.scatter_(1, size.argmax(1, keepdim=True), torch.inf)
        kept = max(len(size), round(average_rank * len(size)))
        if kept < size.numel():
            self.pruned |= size < size.flatten().topk(kept).values[-1]
            self.leaves["core"].masked_fill_(self.pruned, 0.0)
            for key, cut in self.method.cores({"core": self.pruned}).items() if self.ema else ():
                self.ema[key].masked_fill_(cut.unsqueeze(1), 0.0)  # what is exported without these columns is whole

    @torch.no_grad()
    def ema_update(self) -> None:
        """Average the exported pair, with a decay that warms up as min(decay, (1 + t) / (10 + t)): that of
        TensorFlow's ExponentialMovingAverage with num_updates."""
        taken = ~self.skip
        self.updates.add_(taken)
        if self.ema is None:
            return
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.ema_decay)
        weight, present = (1 - decay) * taken, self._averaged()
        side_by_side([partial(self.ema[key].lerp_, stack, weight.to(stack.dtype)) for key, stack in present.items()])

    def _present_start(self) -> Stacks:
        """Orthonormal bases of the factors, coarsely: only the drift of the subspaces is measured from them."""
        fixed, bases = self.on_manifold(), {}
        for key, leaf in self.leaves.items():
            if key.split(".")[0] not in ("core", "magnitude"):
                basis = leaf if key in fixed or not leaf.any() else orthonormalize(leaf)
                bases[key] = (basis * (leaf.abs().amax((1, 2), keepdim=True) > 0)).to(torch.bfloat16)
        return bases

    def _averaged(self) -> Stacks:
        magnitudes = {key: leaf for key, leaf in self.leaves.items() if key.startswith("magnitude.")}
        return self.method.pair(self.leaves) | magnitudes

    # -- state and transfer ------------------------------------------------------------------------------------------

    def state_dict(self) -> Stacks:
        """Everything the adapter is, as a flat dict of tensors (not copies)."""
        return state.gather(self)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a `state_dict` in, to the bit; UserError if it is of other layers, sizes or options."""
        state.restore(self, tensors)

    def pairs(self, weights: str = "raw") -> Iterator[transfer.Pair]:
        """(name, up [m, r'], down [r', n], magnitude [1, n] | None) of every layer; convolutions as kernels."""
        return transfer.export(self, weights)

    def load_pairs(self, pairs: Mapping[str, tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """Continue from another adapter's pairs, exactly; a higher rank is cut by the SVD."""
        transfer.load(self, pairs)

    @torch.no_grad()
    def reset_after_import(self, magnitudes: Mapping[int, Tensor]) -> None:
        """Restart averages, drift and (but for the given layers) magnitudes from the present pair."""
        pair = self.pair_stacks()
        if self.magnitude is not None:
            for key, stack in self.magnitude.start(pair).items():
                for position, number in enumerate(self.layout.members(key)):
                    self.leaves[key][position].copy_(magnitudes.get(number, stack[position]))
        self.updates.zero_()
        if self.pruned is not None:
            self.pruned.zero_()
        self.start = self._present_start()
        if self.ema is not None:
            self.ema = {key: stack.clone() for key, stack in self._averaged().items()}

    @torch.no_grad()
    def restart_average(self) -> None:
        """Let the average begin at the present weights."""
        self.updates.zero_()
        if self.ema is not None:
            for key, stack in self._averaged().items():
                self.ema[key].copy_(stack)

    def delta(self, name: str, weights: str = "raw") -> Tensor:
        """The change of a layer's matrix, [m, n] in fp64, with the start pair and without DoRA's magnitude."""
        return transfer.delta(self, name, weights)

    def describe(self) -> dict[str, float]:
        """Numbers for logs: layers, stacks, trained parameters, and StelLA's d, for which lr * sqrt(d) matters."""
        numbers = {"layers": len(self.layout.targets), "stacks": len(self.leaves),
                   "parameters": sum(leaf.numel() for leaf in self.leaves.values())}
        scale_dim = getattr(self.step_rule, "scale_dim", 0.0)
        return numbers | {"scale_dim": scale_dim} if scale_dim else numbers
