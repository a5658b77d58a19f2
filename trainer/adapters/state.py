"""An adapter's complete state as a flat dict of tensors, saved and restored to the bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.adapters.bank import Adapter

FORMER = ("skipped_in_a_row",)  # what checkpoints of earlier programs have beside


def gather(adapter: Adapter) -> dict[str, Tensor]:
    """Leaves, averages, frozen start pair, start (for drift), counters, and the layers' names as JSON bytes."""
    groups = {"leaf": adapter.leaves, "ema": adapter.ema, "frozen": adapter.frozen, "start": adapter.start}
    tensors = {f"{group}.{key}": stack.detach()
               for group, stacks in groups.items() for key, stack in (stacks or {}).items()}
    if adapter.pruned is not None:
        tensors["pruned"] = adapter.pruned
    tensors["updates"] = adapter.updates
    tensors["steps"] = adapter.steps
    tensors["layers"] = _names(adapter)
    return tensors


def _names(adapter: Adapter) -> Tensor:
    text = json.dumps([target.name for target in adapter.layout.targets])
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


@torch.no_grad()
def restore(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Copy in place, so that no address changes."""
    own, tensors = gather(adapter), {key: tensor for key, tensor in tensors.items() if key not in FORMER}
    if set(own) != set(tensors):
        missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
        raise UserError(f"the saved adapter was made with other settings: it lacks {missing or 'nothing'} and has "
                        f"{extra or 'nothing'} beside; resume with the run's own preset")
    if not torch.equal(own["layers"], tensors["layers"].cpu()):
        raise UserError("the saved adapter belongs to other layers: use the same model and adapter.targets")
    for key, tensor in own.items():
        if tensor.shape != tensors[key].shape or tensor.dtype != tensors[key].dtype:
            raise UserError(f"the saved adapter does not fit: {key} is {tuple(tensors[key].shape)} "
                            f"{tensors[key].dtype}, this run has {tuple(tensor.shape)} {tensor.dtype}; "
                            "adapter.rank may differ")
    addresses = [leaf.data_ptr() for leaf in adapter.parameters()]
    for key, tensor in own.items():
        if key != "layers":
            tensor.copy_(tensors[key])
    assert addresses == [leaf.data_ptr() for leaf in adapter.parameters()]
