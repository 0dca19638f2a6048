"""What a port did, in numbers that a reader can check in the other framework."""

import collections
import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from cifar_jax.models.resnet50 import ResNet50
from cifar_jax.models.transfer import preprocess
from cifar_jax.pretrained.names import printable
from cifar_jax.pretrained.ours import digests
from cifar_jax.pretrained.port import Weights

_FORMULA = "(3 y^2 + 5 x (c + 1) + x y) // 7 mod 256; y < 96, x < 128, c = 0, 1, 2 (RGB)"
_STAGES = ("stem", "stage1", "stage2", "stage3", "stage4", "pooled", "logits")


def picture() -> np.ndarray:
    """Returns the fixed picture, uint8 [1, 96, 128, 3]: not square, and symmetric in no axis."""
    y, x, c = np.ogrid[:96, :128, :3]
    return ((3 * y * y + 5 * x * (c + 1) + x * y) // 7 % 256).astype(np.uint8)[np.newaxis]


def activations(weights: Weights) -> dict[str, np.ndarray]:
    """Returns every stage's output on the picture, float32, by the names of `ResNet50.features`.

    The backbone of a transfer model is fed with the published preprocessing of its variant.
    """
    variant = weights.header.variant
    model = nnx.eval_shape(
        lambda: ResNet50(variant, num_classes=weights.structure.classes, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(model)
    values = {name.removeprefix("backbone."): array for name, array in weights.values.items()}
    filled = nnx.from_flat_state(
        (path, variable.replace(values[".".join(path)]))
        for path, variable in nnx.to_flat_state(state)
    )

    with jax.default_matmul_precision("highest"):
        found = _features(graph, variant, filled, picture())
    return {name: np.asarray(found[name]) for name in _STAGES if name in found}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _features(
    graph: nnx.GraphDef, variant: str, state: nnx.State, images: np.ndarray
) -> dict[str, jax.Array]:
    return nnx.merge(graph, state).features(preprocess(images, variant), train=False)


def certify(weights: Weights, written: str | os.PathLike) -> dict[str, Any]:
    """Returns the certificate of a port as plain data.

    Args:
        weights: what was read and loaded.
        written: the file that was written.
    """
    found = activations(weights)
    return {
        **dataclasses.asdict(weights.header),
        "read": weights.read,
        "loaded": len(weights.values),
        "numbers": sum(array.size for array in weights.values.values()),
        "ignored": list(weights.ignored),
        "written": {"file": Path(written).name, **digests(written)},
        "picture": {"formula": _FORMULA, "preprocessing": weights.header.variant},
        "activations": {name: _statistics(array) for name, array in found.items()},
    }


def as_text(certificate: dict[str, Any]) -> str:
    """Returns a certificate for people to read."""
    written, image = certificate["written"], certificate["picture"]
    lines = [
        "Port certificate",
        f"  source         {certificate['source']} ({certificate['naming']})",
        f"    sha256       {certificate['sha256']}",
        f"    md5          {certificate['md5']}",
        f"  variant        {certificate['variant']}",
        f"  preprocessing  {certificate['preprocessing']}",
        f"  head           {certificate['head']}, upsampling {certificate['upsampling']}, "
        f"interpolation {certificate['interpolation']}",
        f"  license        {certificate['license']}",
        f"  read           {certificate['read']} tensors",
        f"  loaded         {certificate['loaded']} tensors, {certificate['numbers']:,} numbers",
        f"  ignored        {len(certificate['ignored'])} tensors",
        *(f"    {line}" for line in _summary(certificate["ignored"])),
        f"  written        {written['file']}",
        f"    sha256       {written['sha256']}",
        f"  activations    evaluation mode, preprocessing {image['preprocessing']}, on the picture",
        f"    {image['formula']}",
        f"    {'':8}{'shape':>18}{'mean':>14}{'std':>14}{'max |x|':>14}",
    ]
    for name, row in certificate["activations"].items():
        shape = "x".join(map(str, row["shape"]))
        numbers = "".join(f"{row[key]:14.4e}" for key in ("mean", "std", "max_abs"))
        lines.append(f"    {name:8}{shape:>18}{numbers}")
    return "\n".join(lines)


def _summary(names: list[str]) -> list[str]:
    """Returns the names with N for numbers, and how many of each there are."""
    patterns = collections.Counter(re.sub(r"\d+", "N", printable(name)) for name in names)
    return [f"{pattern} ({count})" for pattern, count in patterns.items()]


def _statistics(array: np.ndarray) -> dict[str, Any]:
    wide = array.astype(np.float64)
    return {
        "shape": list(array.shape),
        "mean": float(wide.mean()),
        "std": float(wide.std()),
        "max_abs": float(np.abs(wide).max()),
    }
