"""A little network with linears and convolutions, and adapters over it, for the tests of adapters and optimizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.adapters import Adapter, Target, build
from trainer.optim import build_optimizer, clip_grad_norm

METHODS = ["lora", "stiefel", "stella", "trilora"]
OPTIMIZER = {"lora": "adamw", "stiefel": "stiefel", "stella": "adamw", "trilora": "adamw"}


class TinyNet(nn.Module):
    """Images [b, 6, 5, 5] -> [b, 10]; two linears share a size, so that stacks hold more than one layer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, dtype=dtype)
        self.first = nn.Linear(72, 10, dtype=dtype)
        self.second = nn.Linear(10, 10, bias=False, dtype=dtype)
        self.third = nn.Linear(10, 10, dtype=dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
                parameter.copy_(noise / parameter[0].numel() ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x)).flatten(1)
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def targets_of(net: nn.Module) -> list[Target]:
    return [Target(f"net.{name}", module, type(module).__name__) for name, module in net.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))]


def adapted(method: str, dtype: torch.dtype = torch.float32, **options: object) -> tuple[TinyNet, Adapter]:
    """Three factors start away from zero here (`init`), so that every factor has a gradient at the first step."""
    net = TinyNet(dtype).to(options.get("device", "cpu"))
    start = {"init": "random"} if method in ("stella", "trilora") else {}
    adapter = build(targets_of(net), method=method, dtype=dtype, **{"rank": 3, **start, **options})
    adapter.install()
    return net, adapter


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(step), dtype=dtype)


def train(net: nn.Module, adapter: Adapter, optimizer: torch.optim.Optimizer, steps: range) -> float:
    """Plain training towards zero, with the whole step as the loop takes it; returns the last loss."""
    dtype = adapter.parameters()[0].dtype
    loss = torch.zeros(())
    for step in steps:
        torch.manual_seed(step)
        adapter.refresh("raw", dtype)
        loss = net(batch(step, dtype)).square().mean()
        loss.backward()
        take_step(adapter, optimizer, loss)
    return loss.item()


def take_step(adapter: Adapter, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    adapter.begin_step()
    adapter.guard(loss, clip_grad_norm(adapter.parameters(), 1.0))
    adapter.before_step()
    optimizer.step()
    adapter.after_step()
    adapter.ema_update()
    adapter.zero_grad()


def trained(method: str, steps: int = 5, **options: object) -> tuple[TinyNet, Adapter]:
    net, adapter = adapted(method, **options)
    train(net, adapter, build_optimizer(OPTIMIZER[method], adapter, lr=1e-2), range(steps))
    return net, adapter
