"""What a port did, in numbers that a reader can check in the other framework."""

import collections
import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cifar_jax.models.resnet50 import ResNet50
from cifar_jax.models.transfer import FlattenHead, PooledHead, preprocess
from cifar_jax.pretrained.names import Head, Structure, printable
from cifar_jax.pretrained.ours import Header, digests
from cifar_jax.pretrained.port import Weights

_FORMULA = "(3 y^2 + 5 x (c + 1) + x y) // 7 mod 256; y < {}, x < {}, c = 0, 1, 2 (RGB)"
_POOLED_UPSAMPLING = 8  # of a head that takes any size
_STAGES = ("stem", "stage1", "stage2", "stage3", "stage4", "pooled", "logits")


def picture(head: Head | None = None) -> np.ndarray:
    """Returns the fixed picture, uint8, symmetric in no axis.

    Args:
        head: None gives [1, 96, 128, 3], not square. A transfer model's gives 32x32 pixels, each
            repeated to the size that a flatten head is made for, or x8 for a pooled one.
    """
    height, width = _size(head)
    y, x, c = np.ogrid[:height, :width, :3]
    pixels = ((3 * y * y + 5 * x * (c + 1) + x * y) // 7 % 256).astype(np.uint8)[np.newaxis]
    return pixels.repeat(_upsampling(head), 1).repeat(_upsampling(head), 2)


def preprocessing(header: Header) -> str:
    """Returns how the picture is preprocessed: as the weights' own pictures were, where known.

    Otherwise as for the published weights of the variant.
    """
    return header.variant if header.preprocessing == "unknown" else header.preprocessing


def activations(weights: Weights) -> dict[str, np.ndarray]:
    """Returns every stage's output on the picture, float32, by the names of `ResNet50.features`.

    The logits are those of the top, or of a transfer model's head.
    """
    structure = weights.structure
    create = functools.partial(_Network, structure, preprocessing(weights.header))
    graph, state = nnx.split(nnx.eval_shape(create))
    prefix = "" if structure.head else "backbone."
    filled = nnx.from_flat_state(
        (path, variable.replace(weights.values[".".join(path).removeprefix(prefix)]))
        for path, variable in nnx.to_flat_state(state)
    )
    with jax.default_matmul_precision("highest"):
        found = _run(graph, filled, picture(structure.head))
    return {name: np.asarray(found[name]) for name in _STAGES if name in found}


class _Network(nnx.Module):
    """What a structure describes, for pictures of the right size already."""

    def __init__(self, structure: Structure, preprocessing: str):
        self.preprocessing = preprocessing
        rngs = nnx.Rngs(0)
        self.backbone = ResNet50(structure.variant, num_classes=structure.classes, rngs=rngs)
        shared = dict(dropout=0.0, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)
        create = {"flatten": FlattenHead, "pooled": PooledHead}
        head = structure.head
        self.head = head and create[head.kind](head.features, head.classes, **shared)

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        outputs = self.backbone.features(preprocess(images, self.preprocessing), train=False)
        if self.head is not None:
            maps = outputs["stage4"]
            outputs["logits"] = self.head(maps, train=False, keys=None, axis_name=None)
        return outputs


@functools.partial(jax.jit, static_argnums=0)
def _run(graph: nnx.GraphDef, state: nnx.State, images: np.ndarray) -> dict[str, jax.Array]:
    return nnx.merge(graph, state)(images)


def _size(head: Head | None) -> tuple[int, int]:
    return (32, 32) if head else (96, 128)


def _upsampling(head: Head | None) -> int:
    if head is None:
        return 1
    return head.side if head.kind == "flatten" else _POOLED_UPSAMPLING


def _formula(head: Head | None) -> str:
    factor = _upsampling(head)
    repeated = f"; each pixel repeated {factor} x {factor}" if head else ""
    return _FORMULA.format(*_size(head)) + repeated


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
        "network": weights.network,
        "picture": {
            "formula": _formula(weights.structure.head),
            "preprocessing": preprocessing(weights.header),
        },
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
        *([f"  network        {certificate['network']}"] if certificate["network"] else []),
        f"  head           {certificate['head']}, upsampling {certificate['upsampling']}, "
        f"interpolation {certificate['interpolation']}"
        + (", mean over image and mirror image" if certificate["test_time_flip"] else ""),
        f"  license        {certificate['license']}",
        f"  read           {certificate['read']} entries",
        f"  loaded         {certificate['loaded']} tensors, {certificate['numbers']:,} numbers",
        f"  ignored        {len(certificate['ignored'])} entries",
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
