"""Tells what is on pictures: `python -m cifar_jax.predict --workdir=DIR picture.png ...`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

import numpy as np

from cifar_jax.errors import UserError, exit_on_user_error, set_up_logging
from cifar_jax.labels import CLASS_NAMES
from cifar_jax.picture import read_picture

CHECKPOINTS = ("latest", "best")


def predict_image(
    path: str | os.PathLike,
    *,
    workdir: str | os.PathLike | None = None,
    weights: str | os.PathLike | None = None,
) -> str:
    """Names what is on a picture, by the latest checkpoint of a run or by a file of weights.

    Args:
        path: a picture file, see `cifar_jax.picture.read_picture`.
        workdir: the run's folder.
        weights: in place of a workdir, a file from `port_weights` or `average`.

    Returns:
        One of `cifar_jax.labels.CLASS_NAMES`.

    Raises:
        UserError: the picture, the checkpoint or the file cannot be read.
    """
    return predict_images([path], workdir=workdir, weights=weights)[0]["label"]


def predict_images(
    paths: Sequence[str | os.PathLike],
    *,
    workdir: str | os.PathLike | None = None,
    checkpoint: str = "latest",
    weights: str | os.PathLike | None = None,
) -> list[dict]:
    """Classifies pictures.

    Args:
        paths: picture files.
        workdir: the run's folder.
        checkpoint: "latest" or "best" (on the validation images).
        weights: in place of a workdir, a file from `port_weights` or `average`.

    Returns:
        For each picture {"path": str, "label": str, "probabilities": {class name: float}}, the
        probabilities in descending order.

    Raises:
        UserError: a picture, the checkpoint or the file cannot be read.
    """
    images = [read_picture(path) for path in paths]
    return _classify(paths, images, workdir=workdir, checkpoint=checkpoint, weights=weights)


def _classify(
    paths: Sequence[str | os.PathLike],
    images: list[np.ndarray],
    *,
    workdir: str | os.PathLike | None,
    checkpoint: str,
    weights: str | os.PathLike | None,
) -> list[dict]:
    if not images:
        return []
    # Here, because it imports JAX, for which neither `--help` nor a mistyped path has to wait.
    from cifar_jax.trained import load_trained

    trained = load_trained(workdir, checkpoint, weights=weights)
    answers = []
    for path, row in zip(paths, trained.probabilities(np.stack(images)), strict=True):
        named = dict(zip(CLASS_NAMES, map(float, row), strict=True))
        ranked = dict(sorted(named.items(), key=lambda item: -item[1]))
        answers.append(
            {"path": os.fspath(path), "label": next(iter(ranked)), "probabilities": ranked}
        )
    return answers


def _format(answer: dict) -> str:
    lines = [f"{answer['path']}: {answer['label']}"]
    for name, probability in answer["probabilities"].items():
        lines.append(f"  {name:<10}  {probability:.4f}")
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cifar_jax.predict",
        description="Prints label and probabilities of each picture. Exit code 2 if one is bad.",
    )
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="a picture file")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="the folder of a trained run")
    model.add_argument(
        "--weights", help="or a file that cifar_jax.port_weights or average has written"
    )
    parser.add_argument(
        "--checkpoint",
        choices=CHECKPOINTS,
        default="latest",
        help="which one of the run (default: %(default)s); best is by validation",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; see `--help`."""
    options = _parse(arguments)
    paths, images, errors = [], [], []
    with exit_on_user_error():
        set_up_logging()
        for path in options.pictures:
            try:
                images.append(read_picture(path))
                paths.append(path)
            except UserError as error:
                errors.append(error)
        answers = _classify(
            paths,
            images,
            workdir=options.workdir,
            checkpoint=options.checkpoint,
            weights=options.weights,
        )
        if options.json:
            print(json.dumps(answers, indent=2))
        else:
            for answer in answers:
                print(_format(answer))
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        sys.exit(UserError.exit_code)


if __name__ == "__main__":
    main()
