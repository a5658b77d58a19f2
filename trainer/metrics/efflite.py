"""EfficientNet-Lite0 up to its 1280 pooled features: a small extractor whose weights come with a package."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.metrics import weights

SIZE = 224
DIM = 1280

# kernel, stride, expansion, channels out, repeats (Tan & Le 2019, table 1, at width and depth 1; Lite keeps
# stem and head as they are, drops squeeze-and-excitation and swaps swish for ReLU6)
STAGES = [(3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
          (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)]


class Conv(nn.Conv2d):
    """A convolution padded as TensorFlow does for "SAME": an odd pixel goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:])
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x)


class Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; added to its input where the shapes agree."""

    def __init__(self, kernel: int, stride: int, expansion: int, before: int, after: int) -> None:
        super().__init__()
        wide = before * expansion
        self.expand = Conv(before, wide, 1) if expansion > 1 else None
        self.depthwise = Conv(wide, wide, kernel, stride, groups=wide)
        self.project = Conv(wide, after, 1)
        self.skips = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.expand(x)) if self.expand is not None else x
        h = self.project(F.relu6(self.depthwise(h)))
        return x + h if self.skips else h


class EffLite0(nn.Module):
    """Features [b, 1280] of pictures [b, 3, h, w] in 0…255."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(3, 32, 3, 2)
        self.blocks = nn.ModuleList()
        channels = 32
        for kernel, stride, expansion, out, repeats in STAGES:
            for i in range(repeats):
                self.blocks.append(Block(kernel, stride if i == 0 else 1, expansion, channels, out))
                channels = out
        self.head = Conv(channels, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0.0, 255.0)
        x = F.relu6(self.stem((x - 127.0) / 128.0))  # b 32 112 112
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x)).mean((2, 3))  # b 1280


def load(path: Path) -> EffLite0:
    """The network with the weights of `path`. Raises `UserError` unless it has the package's layout."""
    net = EffLite0()
    layers = {"_conv_stem": ("_bn0", net.stem), "_conv_head": ("_bn1", net.head)}
    for i, block in enumerate(net.blocks):
        names = {"_expand_conv": ("_bn0", block.expand), "_depthwise_conv": ("_bn1", block.depthwise),
                 "_project_conv": ("_bn2", block.project)}
        layers |= {f"_blocks.{i}.{name}": (f"_blocks.{i}.{norm}", conv)
                   for name, (norm, conv) in names.items() if conv is not None}
    weights.fill(layers, weights.load(path), path, spare=("_fc.weight", "_fc.bias"))
    return net
