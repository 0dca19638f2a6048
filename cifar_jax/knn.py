"""Classify by the nearest neighbours among the features of a frozen, pretrained ResNet-50.

    python -m cifar_jax.knn --config=configs/resnet50_probe.py [--test]

Nothing is trained. Each image takes the votes of its k nearest training images, by the cosine of
their pooled features, weighted with exp(cosine / 0.07) (Wu et al., "Unsupervised Feature Learning
via Non-Parametric Instance Discrimination", 2018). The features are those that cifar_jax.features
caches. k is chosen on validation; --test reads the test split with it. Accuracies are printed as
JSON, by k, with the weights, features and splits that they are of.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections

from cifar_jax.command import parse_flags
from cifar_jax.errors import UserError, exit_on_user_error, set_up_logging, tell
from cifar_jax.memory import set_up_memory

KS = (5, 10, 20, 50, 100, 200)
EXAMPLES = {"config": "configs/resnet50_probe.py"}


def main() -> None:
    """Runs the command; exits with 0, 1 (failed run), 2 (bad input) or 128 + signal."""
    with exit_on_user_error():
        values = parse_flags(__doc__, EXAMPLES, switch="test")
        set_up_logging()
        set_up_memory()
        print(json.dumps(evaluate_knn(values.config, KS, test=values.test)))


def evaluate_knn(
    config: ml_collections.ConfigDict, ks: Sequence[int], *, test: bool
) -> dict[str, Any]:
    """Classifies the validation images, and the test images with the best k, by their neighbours.

    Args:
      config: as `configs/common.py` gives it, with a pooled head.
      ks: numbers of neighbours.
      test: whether to read the test split.

    Returns:
      {"weights": the file's header, "features": what they depend on, "splits_sha256": of the rows,
      "validation": accuracy by k} and, where it is read, "test": that of the best k.

    Raises:
      UserError: as `cifar_jax.probe.train_head`.
      SystemExit: with 128 + signal, if one came while features were computed; they are kept.
    """
    # JAX takes seconds to import: --help and bad flags do not wait for it.
    import jax

    from cifar_jax import config as configuration
    from cifar_jax.data.splits import NAMES, fingerprint
    from cifar_jax.initial import find_weights
    from cifar_jax.neighbours import accuracy_by_k
    from cifar_jax.parallel import check_batch_size, check_devices
    from cifar_jax.probe import feature_key, feature_splits, load_backbone
    from cifar_jax.setup import load_splits
    from cifar_jax.signals import StopSignal

    configuration.check(config)
    plain = configuration.to_dict(config)
    configuration.check_features(plain)
    check_devices()
    check_batch_size(plain["eval_batch_size"], key="eval_batch_size")
    for key, expected in (("model.head", "pooled"), ("freeze.features", "stage4")):
        found = dict(configuration.flatten(plain))[key]
        if found != expected:
            raise UserError(f'config.{key} is "{found}"; neighbours need "{expected}"')
    with jax.default_matmul_precision(config.matmul_precision):
        find_weights(plain["model"])  # a file that is missing is told before images are fetched
        data, splits = load_splits(plain)
        loaded, backbone = load_backbone(plain)
        found = {
            "weights": dataclasses.asdict(loaded.header),
            "features": feature_key(plain, backbone, images_sha256=data.sha256),
            "splits_sha256": fingerprint(splits),
        }
        splits = {name: splits[name] for name in (NAMES if test else NAMES[:2])}
        with StopSignal() as stop:
            splits = feature_splits(plain, data, splits, backbone, stop)
        if stop.received is not None:
            tell("stopped; the features so far are kept, and the same command goes on with them")
            sys.exit(128 + stop.received)
        found["validation"] = accuracy_by_k(splits["train"], splits["validation"], ks)
        if test:
            best = max(ks, key=found["validation"].get)
            found["test"] = accuracy_by_k(splits["train"], splits["test"], [best])
        return found


if __name__ == "__main__":
    main()
