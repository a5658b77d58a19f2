"""The mean of all processes' gradients, by one all-reduce a step, and what is whole when a process is lost in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer import checkpoint
from trainer.checkpoint import Progress
from trainer.distributed import World
from trainer.session import Session

STANDSTILL = 10.0  # seconds for the GPU to come to its end, or to where it waits for the lost process
TRIES = 5  # copies of what another step changes meanwhile


class Averager:
    """Gradients, loss and single samples' losses travel together, as one flat tensor.

    The sum over processes is made on the GPUs, in the stream of the step: the hosts do not wait. A loss or gradient
    that is not finite in one process is so in all of them afterwards, so that all skip the step alike.
    """

    def __init__(self, world: World, gradients: Sequence[Tensor], seen: Tensor) -> None:
        """seen: of a process, n 2 b as `Session.seen` has it."""
        self.world, self.gradients = world, list(gradients)
        count = sum(gradient.numel() for gradient in gradients)
        device = seen.device
        self.flat = torch.zeros(count + 1 + world.size * seen.numel(), device=device)
        parts = self.flat[:count].split([gradient.numel() for gradient in gradients])
        self.views = [part.view_as(gradient) for part, gradient in zip(parts, gradients)]
        self.mean, self.loss = self.flat[:count + 1], self.flat[count]
        self.seen = self.flat[count + 1:].view(len(seen), world.size, *seen.shape[1:])  # n ranks 2 b: as draws are cut
        self.marks = torch.zeros(2, dtype=torch.int64, device=device)  # steps whose update began, and ended
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, loss: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Put the mean over processes into the gradients; returns that of the loss, and what all saw (n·ranks 2 b)."""
        self.seen.zero_()
        torch._foreach_copy_(self.views, self.gradients)
        self.loss.copy_(loss)
        self.seen[:, self.world.rank].copy_(seen)
        self.world.add_up(self.flat)
        self.mean.div_(self.world.size)
        torch._foreach_copy_(self.gradients, self.views)
        return self.loss, self.seen.flatten(0, 1)

    def mark(self, step: int, ended: bool) -> None:
        """Note on the device that a step's update begins, or has ended."""
        self.marks[int(ended)].fill_(step)


def prepare(session: Session) -> Averager | None:
    """What averages a session's gradients; None for one process. Every process begins with the first one's state."""
    if session.world.size == 1:
        return None
    align(session)
    averager = Averager(session.world, [leaf.grad for leaf in session.adapter.parameters()], session.seen)
    for ended in (False, True):
        averager.mark(session.progress.step, ended)
    return averager


def bytes_of(session: Session) -> int:
    """What a session's averager takes on the device, whether it is made already or will be."""
    if session.world.size == 1:
        return 0
    trained = sum(leaf.numel() for leaf in session.adapter.parameters())
    return torch.float32.itemsize * (trained + 1 + session.world.size * session.seen.numel())


def align(session: Session) -> None:
    """Give every process the first one's adapter and optimizer: equal arithmetic keeps them equal, on equal GPUs."""
    states = [*session.adapter.state_dict().items(), *session.optimizer.state_dict().items()]
    session.world.spread([tensor for name, tensor in states if name != "layers"])


def save_alone(session: Session, averager: Averager) -> int:
    """Save the last whole step although another process is lost; returns that step.

    The GPU may wait for the lost process for ever, with the update of a step behind that: what is in its memory is
    the step before, which a stream of its own can read. Marks around each update tell which one, and whether one came
    in between. Raises `RuntimeError` where no whole step is to be had.
    """
    if averager.stream is None:
        return _write(session, session.progress.step)
    _wait_for_standstill()
    with torch.cuda.stream(averager.stream):
        for _ in range(TRIES):
            before = averager.marks.tolist()
            states = [{name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
                      for state in (session.adapter.state_dict(), session.optimizer.state_dict())]
            if len({*before, *averager.marks.tolist()}) == 1:
                return _write(session, before[0], *states)
    raise RuntimeError("the GPU did not come to rest")


def _wait_for_standstill() -> None:
    deadline = time.monotonic() + STANDSTILL
    while not torch.cuda.current_stream().query() and time.monotonic() < deadline:
        time.sleep(0.05)


def _write(session: Session, step: int, adapter: dict[str, Tensor] | None = None,
           optimizer: dict[str, Tensor] | None = None) -> int:
    """A checkpoint of a step that the host may be ahead of, unless there is one."""
    run, ahead = session.run, session.progress.step - step
    if step <= run.last_step():
        return run.last_step()
    adapter = dict(session.adapter.state_dict() if adapter is None else adapter)
    adapter["steps"] = adapter["steps"] - ahead  # counted on the host
    progress: Progress = replace(session.progress, step=step)
    size = checkpoint.save(run, progress, adapter, session.optimizer.state_dict() if optimizer is None else optimizer)
    session.recorder.event("checkpoint", step=step, path=str(run.checkpoint(step).relative_to(run.path)), bytes=size)
    return step
