"""Draws the small sample that ships with the package from the original CIFAR-10.

    python experiments/sample/draw.py [--directory DIR]

The same images come out each time. The bytes of the PNG files may differ with Pillow's version, the
decoded arrays (which `cifar_jax.data.sources.SAMPLE_SHA256` vouches for) may not.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

import cifar_jax.data.sources as sources
from cifar_jax.data.content import content_hash
from cifar_jax.data.png_formats import SAMPLE_COLUMNS
from cifar_jax.errors import exit_on_user_error
from cifar_jax.labels import CLASS_NAMES

SEED = 0
PER_CLASS = {"train": 200, "test": 50}
FOLDER = Path(sources.__file__).parent / "sample"


def choose(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of `per_class` images of each class, in the original order."""
    classes = range(len(CLASS_NAMES))
    chosen = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in classes]
    return np.sort(np.concatenate(chosen))


def main() -> None:
    """Draws both splits and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", default=sources.DEFAULT_DIRECTORY)
    with exit_on_user_error():
        dataset = sources.load("auto", parser.parse_args().directory)
    rng = np.random.default_rng(SEED)
    FOLDER.mkdir(exist_ok=True)
    table = {}
    for split, per_class in PER_CLASS.items():
        labels = getattr(dataset, f"{split}_labels")
        rows = choose(labels, per_class, rng)
        images = getattr(dataset, f"{split}_images")[rows]
        # Tiles compress 7 % better than one image a row of pixels, and can be looked at.
        tiles = images.reshape(-1, SAMPLE_COLUMNS, 32, 32, 3).swapaxes(1, 2)
        picture = Image.fromarray(tiles.reshape(-1, SAMPLE_COLUMNS * 32, 3))
        picture.save(FOLDER / f"{split}.png", optimize=True)
        table[split] = labels[rows].tolist()
        print(split, len(rows), content_hash(images, labels[rows]))
    (FOLDER / "labels.json").write_text(json.dumps(table, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
