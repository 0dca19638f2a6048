"""Evaluate a checkpoint on one split, every image counted once.

    python -m cifar_jax.evaluate --workdir=runs/mlp --split=validation --checkpoint=best

Choose on validation: every reading of the test split is noted in the run's run.json.
"""

import argparse
import json
import pathlib
from typing import Any

from cifar_jax.errors import UserError, exit_on_user_error


def evaluate(
    workdir: str | pathlib.Path, *, split: str = "validation", checkpoint: str = "latest"
) -> dict[str, Any]:
    """Returns step, loss, accuracy and count of a run's checkpoint on a split.

    Args:
      workdir: of the run.
      split: "train", "validation" or "test".
      checkpoint: "latest", or "best" on validation.

    Raises:
      UserError: without such a checkpoint, or if the run's images or splits cannot be had again.
    """
    from cifar_jax.data.pipeline import eval_batches
    from cifar_jax.data.sources import load
    from cifar_jax.data.splits import fingerprint, make_splits
    from cifar_jax.losses import cross_entropy
    from cifar_jax.metrics import Metrics, Totals
    from cifar_jax.recording.run_record import count_test_read
    from cifar_jax.trained import load_trained

    workdir = pathlib.Path(workdir).expanduser()
    trained = load_trained(workdir, checkpoint)
    config = trained.extra["config"]
    data = load(config["data"]["source"], config["data"]["directory"])
    splits = make_splits(
        data, protocol=config["data"]["protocol"], seed=config["data"]["split_seed"]
    )
    found = {"splits_sha256": fingerprint(splits), "data_sha256": data.sha256}
    if any(trained.extra[key] != value for key, value in found.items()):
        raise UserError(f"{workdir} was trained on other images or splits than {data.source} gives")
    if split == "test":
        count_test_read(workdir, {"step": trained.step, "checkpoint": checkpoint})
    totals = Totals()
    for batch in eval_batches(splits[split], batch_size=config["eval_batch_size"]):
        logits = trained.logits(batch["image"])
        losses = cross_entropy(logits, batch["label"])
        totals.add(Metrics.of(losses, logits, batch["label"], batch["mask"]))
    return {"step": trained.step, **totals.means(), "count": totals.count}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--split", default="validation", choices=("train", "validation", "test"))
    parser.add_argument("--checkpoint", default="latest", choices=("latest", "best"))
    options = parser.parse_args()
    with exit_on_user_error():
        print(json.dumps(evaluate(**vars(options))))


if __name__ == "__main__":
    main()
