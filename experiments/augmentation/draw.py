"""Draws what each augmentation makes of the same five images: augmentation.png.

python -m experiments.augmentation.draw
"""

import io
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from cifar_jax.augment import Augment, augment
from cifar_jax.data.sources import load
from cifar_jax.trivial_augment import OPERATIONS

FOLDER = Path(__file__).parent
COUNT = 5
SETTINGS = {
    "as it is": Augment(),
    "flip": Augment(flip=True),
    "crop_padding 4": Augment(crop_padding=4),
    "policy trivial": Augment(policy="trivial"),
    "mixup 0.2": Augment(mixup=0.2),
    "cutmix 1.0": Augment(cutmix=1.0),
}
STRENGTH = 0.5  # of the single operations


def rows(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns each row's images by its name: the settings, then TrivialAugment's operations."""
    keys = jax.random.split(jax.random.key(0), len(images))
    pictures = {name: augment(images, labels, keys, config)[0] for name, config in SETTINGS.items()}
    for name, operation in OPERATIONS.items():
        moved = jax.vmap(operation, (0, None))(images.astype(np.float32), STRENGTH)
        pictures[f"trivial: {name}"] = moved
    return {name: np.asarray(x).round().astype(np.uint8) for name, x in pictures.items()}


def main() -> None:
    """Draws the picture."""
    data = load("sample")
    pictures = rows(data.test_images[:COUNT], data.test_labels[:COUNT])
    figure = Figure(figsize=(6, 1.0 * len(pictures)), layout="constrained")
    axes = figure.subplots(len(pictures), COUNT)
    for row, (name, images) in zip(axes, pictures.items(), strict=True):
        for place, image in zip(row, images, strict=True):
            place.imshow(image)
            place.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=72)
    # A palette of 256 colours is a quarter of the size.
    Image.open(drawn).convert("RGB").quantize(256).save(FOLDER / "augmentation.png", optimize=True)


if __name__ == "__main__":
    main()
