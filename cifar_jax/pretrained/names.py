"""Our names and shapes: what a complete file of ResNet-50 or transfer-model weights holds.

The published formats (`keras`, `torch`) are described against this list of layers, and every file
is compared with it both ways.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

VARIANTS = ("keras", "torchvision")
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width, blocks; He et al. 2015, table 1
FEATURES = 2048
IMAGENET_CLASSES = 1000
HIDDEN = (128, 64)  # of the flatten head

_MOST_LISTED = 1000  # a whole model has 320 tensors and 180 layers
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """The layers that a transfer model puts behind its backbone."""

    kind: Literal["flatten", "pooled"]
    features: int  # entering the head
    classes: int

    @property
    def side(self) -> int:
        """Pixels a side of the maps that a flatten head reads."""
        return math.isqrt(self.features // FEATURES)


@dataclass(frozen=True)
class Structure:
    """Which parameters a file of weights has."""

    variant: str  # "keras": convolutions have biases; "torchvision": they have none
    classes: int | None = None  # of ResNet-50's own top; None without top
    head: Head | None = None  # not None: a whole transfer model

    @property
    def tuned_head(self) -> str | None:
        """Kind of the head of a fine-tuned model: a top that is not ImageNet's is a pooled one."""
        if self.head:
            return self.head.kind
        return None if self.classes in (None, IMAGENET_CLASSES) else "pooled"

    @property
    def outputs(self) -> int | None:
        """Number of classes, None without head or top."""
        return self.head.classes if self.head else self.classes


@dataclass(frozen=True)
class Layer:
    """One layer with parameters. Shapes are ours: kernels HWIO, 1x1 kernels [in, out]."""

    path: str
    kind: Literal["conv", "norm", "dense"]
    kernel: Shape = ()  # conv: (height, width, in, out), dense: (in, out)
    channels: int = 0  # norm
    biased: bool = True

    def parameters(self) -> dict[str, Shape]:
        """Returns {"kernel": shape, ...} of this layer, in the order in which Keras keeps them."""
        if self.kind == "norm":
            return dict.fromkeys(("scale", "bias", "mean", "var"), (self.channels,))
        pointwise = self.kind == "conv" and self.kernel[:2] == (1, 1)
        kernel = {"kernel": self.kernel[2:] if pointwise else self.kernel}
        return kernel | ({"bias": self.kernel[-1:]} if self.biased else {})


@dataclass(frozen=True)
class Entry:
    """How one tensor of another format becomes one of ours, and back."""

    name: str  # ours
    shape: Shape  # ours
    source_shape: Shape
    axes: tuple[int, ...]  # the source's axes in our order

    def load(self, array: np.ndarray) -> np.ndarray:
        """Returns ours from the source's."""
        return np.ascontiguousarray(array.transpose(self.axes)).reshape(self.shape)

    def store(self, array: np.ndarray) -> np.ndarray:
        """Returns the source's from ours."""
        unsqueezed = array.reshape([self.source_shape[axis] for axis in self.axes])
        return np.ascontiguousarray(unsqueezed.transpose(np.argsort(self.axes)))


def layers(structure: Structure) -> list[Layer]:
    """Returns the layers of a structure; those of the backbone in Keras's topological order."""
    prefix = "backbone." if structure.head else ""
    found = [*_backbone(prefix, biased=structure.variant == "keras")]
    if structure.classes is not None:
        found.append(Layer(prefix + "top", "dense", kernel=(FEATURES, structure.classes)))
    return found + _head(structure.head)


def shapes(structure: Structure) -> dict[str, Shape]:
    """Returns {our name: our shape} of every parameter and statistic."""
    return {
        f"{layer.path}.{leaf}": shape
        for layer in layers(structure)
        for leaf, shape in layer.parameters().items()
    }


def structure_of(found: Mapping[str, np.ndarray], variant: str) -> Structure:
    """Returns the structure whose parameters the (our) names look like; `differences` judges."""
    head = None
    if any(name.startswith("backbone.") for name in found):
        kind = "flatten" if "head.dense1.kernel" in found else "pooled"
        first = found.get("head.dense1.kernel" if kind == "flatten" else "head.logits.kernel")
        head = Head(kind, features=size(first), classes=size(found.get("head.logits.bias")))
    top = found.get("backbone.top.bias" if head else "top.bias")
    return Structure(variant, classes=None if top is None else size(top), head=head)


def differences(found: Mapping[str, np.ndarray], expected: Mapping[str, Shape]) -> list[str]:
    """Compares both ways: names, shapes, float32, finite numbers, variances that are none.

    Returns:
        One line for each difference; empty where the tensors are exactly the expected ones.
    """
    lines = [f"{name}: missing" for name in expected if name not in found]
    dtypes = {}
    for name, array in found.items():
        if name not in expected:
            lines.append(f"{printable(name)}: unexpected, {array.dtype} {array.shape}")
        elif array.shape != tuple(expected[name]):
            lines.append(f"{name}: shape {array.shape}, expected {tuple(expected[name])}")
        elif not array.size:
            lines.append(f"{name}: shape {array.shape}, which holds no numbers")
        elif array.dtype != np.float32:
            dtypes[name] = str(array.dtype)
        elif not np.isfinite(array).all():
            lines.append(f"{name}: NaN or infinite numbers")
        elif name.endswith(("var", "variance")) and array.min() < 0:
            lines.append(f"{name}: negative variance")
    return lines + wrong_dtypes(dtypes)


def listed(lines: list[str]) -> str:
    """Returns the lines below each other; of more than any ResNet-50 explains, the first ones."""
    more = len(lines) - _MOST_LISTED
    shown = lines[:_MOST_LISTED] + ([f"... and {more:,} more"] if more > 0 else [])
    return "\n  ".join(shown)


def wrong_dtypes(dtypes: Mapping[str, str]) -> list[str]:
    """Returns one line for each dtype of {name: dtype}, all of which should be float32."""
    lines = []
    for dtype in sorted(set(dtypes.values())):
        first, *more = (name for name, found in dtypes.items() if found == dtype)
        others = f" and {len(more)} more" if more else ""
        lines.append(
            f"{printable(first)}{others}: {dtype}, expected float32; convert before saving "
            "(PyTorch: tensor.float())"
        )
    return lines


def printable(name: str) -> str:
    """Returns a name from an untrusted file so that it cannot break or forge a line."""
    return name if is_printable(name) and len(name) < 200 else ascii(name[:200])


def is_printable(text: str) -> bool:
    """Tells whether a text stays within its line."""
    return text.isascii() and text.isprintable()


def _backbone(prefix: str, *, biased: bool) -> Iterator[Layer]:
    def pair(conv: str, norm: str, *kernel: int) -> Iterator[Layer]:
        yield Layer(prefix + conv, "conv", kernel=kernel, biased=biased)
        yield Layer(prefix + norm, "norm", channels=kernel[-1])

    yield from pair("stem_conv", "stem_norm", 7, 7, 3, 64)
    channels = 64
    for stage, (width, blocks) in enumerate(STAGES, 1):
        for block in range(1, blocks + 1):
            path = f"stage{stage}.block{block}."
            yield from pair(path + "conv1", path + "norm1", 1, 1, channels, width)
            yield from pair(path + "conv2", path + "norm2", 3, 3, width, width)
            if block == 1:
                shortcut = path + "shortcut_conv", path + "shortcut_norm"
                yield from pair(*shortcut, 1, 1, channels, 4 * width)
            yield from pair(path + "conv3", path + "norm3", 1, 1, width, 4 * width)
            channels = 4 * width


def _head(head: Head | None) -> list[Layer]:
    if head is None:
        return []
    if head.kind == "pooled":
        return [Layer("head.logits", "dense", kernel=(FEATURES, head.classes))]
    # A number of features that no square picture gives is compared with the nearest that one does.
    widths = (max(head.side, 1) ** 2 * FEATURES, *HIDDEN, head.classes)
    found = []
    for index, name in enumerate(("dense1", "dense2", "logits")):
        found.append(Layer(f"head.norm{index + 1}", "norm", channels=widths[index]))
        found.append(Layer(f"head.{name}", "dense", kernel=widths[index : index + 2]))
    return found


def size(array: np.ndarray | None) -> int:
    """Returns the length of an array's first axis, 0 where there is none."""
    return array.shape[0] if array is not None and array.ndim else 0
