"""The repeated transformer blocks of a denoiser: what is checkpointed, offloaded and counted one by one."""

from __future__ import annotations

from torch import nn


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """They in the order of execution: double and then single blocks of a transformer, or a UNet's way down and up.

    Works on a skeleton on the meta device too.
    """
    if hasattr(denoiser, "down_blocks"):
        stages = (*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks)
    else:
        stages = (denoiser,)
    lists = [child for stage in stages for path, child in stage.named_modules()
             if path.rpartition(".")[2] in ("transformer_blocks", "single_transformer_blocks")]
    return [block for blocks in lists for block in blocks]
