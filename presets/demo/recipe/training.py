"""Training by the clock: AdamW with a cosine over minutes, a warmed-up EMA, a resumable state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_REPORT_SECONDS = 20
_WARMUP_STEPS = 200


def prepare_device() -> None:
    """Fast kernels for fixed shapes; a model that cannot be compiled runs eagerly instead."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.suppress_errors = True


def autocast() -> torch.autocast:
    """bf16 for the forward pass; weights, optimizer and loss stay fp32."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


def compiled(function: Callable) -> Callable:
    """`function` through torch.compile on a GPU; unchanged on a CPU, where trial runs are short."""
    return torch.compile(function, dynamic=False) if DEVICE.type == "cuda" else function


class Fit:
    """A model in training, with everything that a resumed stage needs."""

    def __init__(self, name: str, model: nn.Module, peak_lr: float, work: Path, ema_decay: float = 0.999) -> None:
        self.name, self.model, self.peak_lr, self.ema_decay = name, model, peak_lr, ema_decay
        self.params = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.params, lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.ema = [param.detach().clone() for param in self.params]
        self.step, self.elapsed = 0, 0.0  # seconds of earlier calls are counted in `elapsed`
        self.state_file = work / f"{name}.pt"
        if self.state_file.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.state_file, map_location=DEVICE, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema, self.step, self.elapsed = state["ema"], state["step"], state["elapsed"]
        print(f"{self.name}: continues at step {self.step}, {self.elapsed / 60:.1f} minutes in", flush=True)

    def save(self) -> None:
        """Written aside and renamed, so that a stop in the middle leaves the earlier state."""
        aside = self.state_file.with_suffix(".tmp")
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "ema": self.ema, "step": self.step, "elapsed": self.elapsed}, aside)  # fmt: skip
        aside.replace(self.state_file)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its EMA weights, in eval mode."""
        raw = [param.detach().clone() for param in self.params]
        torch._foreach_copy_([param.data for param in self.params], self.ema)
        self.model.eval()
        try:
            yield
        finally:
            torch._foreach_copy_([param.data for param in self.params], raw)
            self.model.train()

    def _learning_rate(self, progress: float) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.peak_lr * max(cosine, 0.002) * min(1.0, (self.step + 1) / _WARMUP_STEPS)

    def _update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # A horizon that grows with the step: a fixed 0.999 would still remember the random start.
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.ema, [param.detach() for param in self.params], 1 - decay)
        self.step += 1

    def run(
        self,
        loss: Callable[[], Tensor],
        batch_size: int,
        started: float,
        minutes: float,
        total_minutes: float,
        evaluate: Callable[[], str],
    ) -> None:
        """Steps until `minutes` after `started`, then saves. The cosine spans `total_minutes` over all calls."""
        earlier = self.elapsed
        reported, summed, count = time.monotonic(), torch.zeros((), device=DEVICE), 0
        reports = 0
        self.model.train()
        while (now := time.monotonic() - started) < minutes * 60:
            self.elapsed = earlier + now
            lr = self._learning_rate(self.elapsed / (total_minutes * 60))
            value = loss()
            value.backward()
            self._update(lr)
            summed, count = summed + value.detach(), count + 1
            if count % 25 == 0 and time.monotonic() - reported > _REPORT_SECONDS:
                mean = summed.item() / count  # waits for the device, so that the speed is an honest one
                speed = count * batch_size / (time.monotonic() - reported)
                score = evaluate() if reports % 3 == 2 else ""
                print(f"{self.name} step {self.step} {self.elapsed:.0f}s lr {lr:.1e} loss {mean:.4f} "
                      f"{speed:.0f} img/s {score}", flush=True)  # fmt: skip
                reports += 1
                reported, summed, count = time.monotonic(), torch.zeros((), device=DEVICE), 0
        self.elapsed = earlier + time.monotonic() - started
        print(f"{self.name} stops at step {self.step}, {self.elapsed / 60:.2f} min: {evaluate()}", flush=True)
        self.save()
