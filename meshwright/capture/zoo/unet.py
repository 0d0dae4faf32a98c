"""UNet that predicts the noise in an image, as in denoising diffusion.

Sizes: Ho et al. 2020 (arXiv 2006.11239), appendix B. Down and up paths of residual blocks joined
by skip connections, attention at chosen resolutions, group norm of 32 groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.capture.zoo.family import Family, InputSampler, require

__all__ = ["FAMILY", "UNet", "UNetConfig"]

NUM_DIFFUSION_STEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig:
    """Sizes of a UNet."""

    channels: int
    multipliers: tuple[int, ...]
    """Channels of each resolution, in units of ``channels``; each next one halves the image."""
    num_blocks: int
    """Residual blocks per resolution on the way down; one more on the way up."""
    attention_size: int
    """Image size at which attention follows each block (and in the middle)."""
    image_size: int
    num_groups: int = 32

    def __post_init__(self) -> None:
        factor = 2 ** (len(self.multipliers) - 1)
        require(len(self.multipliers) > 0 and self.num_blocks > 0, "a UNet needs blocks")
        require(
            self.image_size % factor == 0,
            f"image_size={self.image_size} must be a multiple of {factor}, "
            f"for {len(self.multipliers)} resolutions",
        )
        require(
            self.channels % self.num_groups == 0,
            f"channels={self.channels} must be a multiple of num_groups={self.num_groups}",
        )


class ResidualBlock(nn.Module):
    """Two convolutions with the time step's embedding added between them, and a skip."""

    def __init__(self, inputs: int, outputs: int, time_size: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.moment = nn.Linear(time_size, outputs)
        self.norm2 = nn.GroupNorm(num_groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, moment: Tensor) -> Tensor:
        """(B, inputs, height, width) to (B, outputs, height, width)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.moment(F.silu(moment)).unsqueeze(-1).unsqueeze(-1)
        return self.conv2(F.silu(self.norm2(y))) + self.skip(x)


class ImageAttention(nn.Module):
    """Single-head attention between the pixels, with a skip connection."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as the input."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            self.query(pixels).unsqueeze(1),
            self.key(pixels).unsqueeze(1),
            self.value(pixels).unsqueeze(1),
        )
        return x + self.output(mixed.squeeze(1)).transpose(1, 2).reshape(x.shape)


class Step(nn.Module):
    """One residual block, followed by attention where the resolution asks for it."""

    def __init__(self, config: UNetConfig, inputs: int, outputs: int, *, attends: bool) -> None:
        super().__init__()
        self.block = ResidualBlock(inputs, outputs, 4 * config.channels, config.num_groups)
        self.attention = ImageAttention(outputs, config.num_groups) if attends else nn.Identity()

    def forward(self, x: Tensor, moment: Tensor) -> Tensor:
        """(B, inputs, height, width) to (B, outputs, height, width)."""
        return self.attention(self.block(x, moment))


class Shrink(nn.Module):
    """Halves height and width with a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) to (B, C, height / 2, width / 2)."""
        return self.conv(x)


class Grow(nn.Module):
    """Doubles height and width: nearest neighbor, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) to (B, C, 2 height, 2 width)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """Noise predictor; ``forward`` returns the mean squared error."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        base = config.channels
        self.time_width = base
        self.time1 = nn.Linear(base, 4 * base)
        self.time2 = nn.Linear(4 * base, 4 * base)
        self.stem = nn.Conv2d(3, base, 3, padding=1)
        self.down, skips = _down_path(config)
        channels = skips[-1]
        self.middle1 = Step(config, channels, channels, attends=True)
        self.middle2 = Step(config, channels, channels, attends=False)
        self.up = _up_path(config, skips)
        channels = base * config.multipliers[0]
        self.norm = nn.GroupNorm(config.num_groups, channels)
        self.head = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, images: Tensor, time_steps: Tensor, noise: Tensor) -> Tensor:
        """Error of guessing ``noise`` in ``images``, both (B, 3, height, width); steps (B,)."""
        moment = self._time_embedding(time_steps, images.dtype)
        skips = [self.stem(images)]
        for layer in self.down:
            x = skips[-1]
            skips.append(layer(x, moment) if isinstance(layer, Step) else layer(x))
        x = self.middle2(self.middle1(skips[-1], moment), moment)
        for layer in self.up:
            joins = isinstance(layer, Step)
            x = layer(torch.cat((x, skips.pop()), dim=1), moment) if joins else layer(x)
        return F.mse_loss(self.head(F.silu(self.norm(x))), noise)

    def _time_embedding(self, time_steps: Tensor, dtype: torch.dtype) -> Tensor:
        """Sines and cosines of the time step at falling frequencies, then two layers."""
        wide = torch.promote_types(dtype, torch.float32)
        half = self.time_width // 2
        index = torch.arange(half, dtype=wide, device=time_steps.device)
        frequency = torch.exp(index * (-math.log(10000.0) / (half - 1)))
        angle = time_steps.to(wide).unsqueeze(1) * frequency
        waves = torch.cat((angle.sin(), angle.cos()), dim=1).to(dtype)
        return self.time2(F.silu(self.time1(waves)))


def _down_path(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """Layers of falling resolution, and the channels of the stem's result and of each layer's."""
    layers, channels, size = nn.ModuleList(), [config.channels], config.image_size
    for level, multiplier in enumerate(config.multipliers):
        outputs = config.channels * multiplier
        for _ in range(config.num_blocks):
            attends = size == config.attention_size
            layers.append(Step(config, channels[-1], outputs, attends=attends))
            channels.append(outputs)
        if level < len(config.multipliers) - 1:
            layers.append(Shrink(outputs))
            channels.append(outputs)
            size //= 2
    return layers, channels


def _up_path(config: UNetConfig, skips: list[int]) -> nn.ModuleList:
    """Layers of rising resolution; each step also reads the latest skip not yet read."""
    layers, waiting, channels = nn.ModuleList(), list(skips), skips[-1]
    for level, multiplier in reversed(list(enumerate(config.multipliers))):
        attends = config.image_size >> level == config.attention_size
        outputs = config.channels * multiplier
        for _ in range(config.num_blocks + 1):
            layers.append(Step(config, channels + waiting.pop(), outputs, attends=attends))
            channels = outputs
        if level > 0:
            layers.append(Grow(channels))
    return layers


def _example_inputs(
    config: UNetConfig, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Tensor]:
    del seq_len
    shape = (batch_size, 3, config.image_size, config.image_size)
    return {
        "images": sampler.normal(shape),
        "time_steps": sampler.integers((batch_size,), end=NUM_DIFFUSION_STEPS),
        "noise": sampler.normal(shape),
    }


FAMILY = Family(
    name="unet",
    build=UNet,
    example_inputs=_example_inputs,
    models={
        "tiny-unet": UNetConfig(
            channels=16,
            multipliers=(1, 2),
            num_blocks=1,
            attention_size=8,
            image_size=16,
            num_groups=8,
        ),
        "unet-cifar10": UNetConfig(
            channels=128, multipliers=(1, 2, 2, 2), num_blocks=2, attention_size=16, image_size=32
        ),
        "unet-256": UNetConfig(
            channels=128,
            multipliers=(1, 1, 2, 2, 4, 4),
            num_blocks=2,
            attention_size=16,
            image_size=256,
        ),
    },
)
