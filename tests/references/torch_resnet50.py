"""ResNet-50 v1.5 in PyTorch, written from the paper and the published parameter names.

torchvision's names and shapes, so that its files load; nothing of ours is imported.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    def __init__(self, features_in: int, width: int, stride: int, *, projects: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(features_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if projects:
            self.downsample = nn.Sequential(
                nn.Conv2d(features_in, 4 * width, 1, stride=stride, bias=False),
                nn.BatchNorm2d(4 * width),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In place, as torchvision's: `experiments/benchmarks` times this, too.
        y = F.relu_(self.bn1(self.conv1(x)))
        y = F.relu_(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu_(y)


def _stage(features_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(features_in, width, stride, projects=True)
    others = [Bottleneck(4 * width, width, 1, projects=False) for _ in range(blocks - 1)]
    return nn.Sequential(first, *others)


class ResNet50(nn.Module):
    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, 3, 1)
        self.layer2 = _stage(256, 128, 4, 2)
        self.layer3 = _stage(512, 256, 6, 2)
        self.layer4 = _stage(1024, 512, 3, 2)
        self.fc = nn.Linear(2048, num_classes)

    def features(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Stage outputs by our names, channels last: x is [B, 3, H, W]."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        outputs = {"stem": x}
        for i, layer in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), start=1):
            x = outputs[f"stage{i}"] = layer(x)
        outputs = {name: y.permute(0, 2, 3, 1) for name, y in outputs.items()}
        outputs["pooled"] = x.mean((2, 3))
        outputs["logits"] = self.fc(outputs["pooled"])
        return outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x)["logits"]
