"""ResNet with bottleneck blocks, and Alpa's wide ones.

Sizes: He et al. 2015 (arXiv 1512.03385), table 1; ``wide-resnet-*`` from Alpa (arXiv
2201.12023), table 7. ``width_factor`` widens the result of each block's 3x3 convolution, as
in Alpa's model; the stride sits on that convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.capture.zoo.family import Family, InputSampler, require

__all__ = ["FAMILY", "ResNet", "ResNetConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResNetConfig:
    """Sizes of a ResNet."""

    blocks: tuple[int, ...]
    """Blocks per stage; each stage after the first halves the image and doubles the channels."""
    channels: int = 64
    """Of the first convolution and of the first stage's inner convolutions."""
    width_factor: int = 1
    image_size: int = 224
    num_classes: int = 1000

    def __post_init__(self) -> None:
        require(len(self.blocks) > 0 and min(self.blocks) > 0, "blocks must be positive numbers")


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with a skip connection."""

    def __init__(self, inputs: int, channels: int, *, width_factor: int, stride: int) -> None:
        super().__init__()
        wide, outputs = channels * width_factor, 4 * channels
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, wide, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.conv3 = nn.Conv2d(wide, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, height, width) to (B, 4 * channels, height / stride, width / stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.skip(x))


class ResNet(nn.Module):
    """Image classifier; ``forward`` returns the mean cross entropy."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, config.channels, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(config.channels),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        stages: list[nn.Module] = []
        inputs = config.channels
        for index, num_blocks in enumerate(config.blocks):
            channels = config.channels * 2**index
            blocks: list[nn.Module] = []
            for position in range(num_blocks):
                stride = 2 if index > 0 and position == 0 else 1
                block = Bottleneck(
                    inputs, channels, width_factor=config.width_factor, stride=stride
                )
                blocks.append(block)
                inputs = 4 * channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, config.num_classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Loss of classifying ``images`` (B, 3, height, width) as ``labels`` (B,)."""
        x = self.stages(self.stem(images))
        return F.cross_entropy(self.head(x.mean(dim=(2, 3))), labels)


def _example_inputs(
    config: ResNetConfig, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Tensor]:
    del seq_len
    return {
        "images": sampler.normal((batch_size, 3, config.image_size, config.image_size)),
        "labels": sampler.integers((batch_size,), end=config.num_classes),
    }


_BLOCKS_50 = (3, 4, 6, 3)
_BLOCKS_101 = (3, 4, 23, 3)


def _wide(blocks: tuple[int, ...], channels: int, width_factor: int) -> ResNetConfig:
    # Alpa's benchmark classifies into 1024 classes so that the head divides evenly.
    return ResNetConfig(
        blocks=blocks, channels=channels, width_factor=width_factor, num_classes=1024
    )


FAMILY = Family(
    name="resnet",
    build=ResNet,
    example_inputs=_example_inputs,
    models={
        "tiny-resnet": ResNetConfig(blocks=(1, 2), channels=8, image_size=32, num_classes=16),
        "resnet-50": ResNetConfig(blocks=_BLOCKS_50),
        "resnet-101": ResNetConfig(blocks=_BLOCKS_101),
        "resnet-152": ResNetConfig(blocks=(3, 8, 36, 3)),
        "wide-resnet-50-250m": _wide(_BLOCKS_50, 160, 2),
        "wide-resnet-50-1b": _wide(_BLOCKS_50, 320, 2),
        "wide-resnet-50-2b": _wide(_BLOCKS_50, 448, 2),
        "wide-resnet-50-4b": _wide(_BLOCKS_50, 640, 2),
        "wide-resnet-50-6.8b": _wide(_BLOCKS_50, 320, 16),
        "wide-resnet-101-13b": _wide(_BLOCKS_101, 320, 16),
    },
)
