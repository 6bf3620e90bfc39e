"""The three networks and the recipe of the article that this library started from, unchanged."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn


class ConvModel(nn.Module):
    """Three 3x3 convolutions, each with ReLU and 2x2 max-pooling, then `fc`: (B, 3, 64, 64) -> (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.fc = nn.Linear(64 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in (self.conv1, self.conv2, self.conv3):
            x = nn.functional.max_pool2d(torch.relu(convolution(x)), 2)
        return self.fc(x.flatten(1))


class PretrainedResNet(nn.Module):
    """A plain (not residual) network with the stages of a ResNet; `fc` trains: (B, 3, H, W) -> (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _layer(64, 64, stride=1)
        self.layer2 = _layer(64, 128, stride=2)
        self.layer3 = _layer(128, 256, stride=2)
        self.layer4 = _layer(256, 512, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PretrainedResNetVariation(PretrainedResNet):
    """The same network; `fc` and `layer4` train."""


def _layer(in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels),
    )


def freeze_by_name(network: nn.Module, trainable: Collection[str]) -> list[str]:
    """The article's recipe: freeze each parameter whose name contains none of the words; return what it prints."""
    lines = []
    for name, parameter in network.named_parameters():
        parameter.requires_grad = any(word in name for word in trainable)
        lines.append(f"{'Trainable' if parameter.requires_grad else 'Frozen'} parameter: {name}")
    return lines
