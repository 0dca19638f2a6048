"""The notebook's transfer model on ResNet-50 v1.5 in PyTorch, and some steps of its training.

The backbone's norms keep statistics as PyTorch's do, the head's as Keras's: written out here.
"""

import numpy as np
import torch
from torch import nn

from tests.references import torch_resnet50, weights

MEAN = np.array([0.485, 0.456, 0.406])
DEVIATION = np.array([0.229, 0.224, 0.225])


class KerasNorm(nn.Module):
    """Keras's batch norm in training, with its defaults: epsilon 1e-3, momentum 0.99, n/n."""

    def __init__(self, features: int):
        super().__init__()
        for name in ("scale", "bias"):
            setattr(self, name, nn.Parameter(torch.zeros(features)))
        for name in ("mean", "var"):
            self.register_buffer(name, torch.zeros(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = x.mean(0), x.var(0, unbiased=False)
        with torch.no_grad():
            self.mean.mul_(0.99).add_(0.01 * mean)
            self.var.mul_(0.99).add_(0.01 * var)
        return (x - mean) / torch.sqrt(var + 1e-3) * self.scale + self.bias


class Dense(nn.Module):
    def __init__(self, features_in: int, features_out: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(features_in, features_out))
        self.bias = nn.Parameter(torch.zeros(features_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.kernel + self.bias


class Head(nn.Module):
    """Layers by our names, so that values go in as they are."""

    def __init__(self, features: int):
        super().__init__()
        widths = (features, 128, 64, 10)
        for number, name in enumerate(("dense1", "dense2", "logits")):
            setattr(self, f"norm{number + 1}", KerasNorm(widths[number]))
            setattr(self, name, Dense(*widths[number : number + 2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.dense1(self.norm1(x)))
        x = torch.relu(self.dense2(self.norm2(x)))
        return self.logits(self.norm3(x))


def train(
    flat: weights.Flat,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    steps: int,
    learning_rate: float,
    upsampling: int,
) -> tuple[list[float], weights.Flat]:
    """Keras's RMSprop from the given values, float64: the losses, all variables afterwards."""
    backbone, head = torch_resnet50.ResNet50(), Head(upsampling**2 * 2048)
    backbone.fc = nn.Identity()
    backbone, head = backbone.double().train(), head.double()
    body = {p.removeprefix("backbone."): x for p, x in flat.items() if p.startswith("backbone.")}
    weights.to_torch(body, backbone)
    top = {p.removeprefix("head."): x for p, x in flat.items() if p.startswith("head.")}
    head.load_state_dict({p: torch.from_numpy(np.array(x)) for p, x in top.items()})
    pixels = (images.repeat(upsampling, 1).repeat(upsampling, 2) / 255 - MEAN) / DEVIATION
    x, y = torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()), torch.from_numpy(labels)
    params = [*backbone.parameters(), *head.parameters()]
    squares, losses = [torch.zeros_like(p) for p in params], []
    for _ in range(steps):
        maps = backbone.features(x)["stage4"]  # channels last, as Flatten takes them in Keras
        loss = nn.functional.cross_entropy(head(maps.reshape(len(maps), -1)), y)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, params)
        with torch.no_grad():
            for p, square, g in zip(params, squares, gradients, strict=True):
                square.mul_(0.9).add_(0.1 * g * g)
                p.sub_(learning_rate * g / torch.sqrt(square + 1e-7))
    after = {f"backbone.{p}": x for p, x in weights.from_torch(backbone.state_dict(), body).items()}
    return losses, after | {f"head.{p}": x.detach().numpy() for p, x in head.state_dict().items()}
