"""Evaluate a checkpoint on one split, every image counted once.

    python -m cifar_jax.evaluate --workdir=runs/mlp --split=validation --checkpoint=best

Choose on validation: every reading of the test split is noted in the run's run.json.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np

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
    from cifar_jax.recording.run_record import count_test_read, read_run_record
    from cifar_jax.trained import load_trained

    trained = load_trained(workdir, checkpoint)
    config, record = trained.config["data"], read_run_record(workdir)
    data = load(config["source"], config["directory"])
    splits = make_splits(data, protocol=config["protocol"], seed=config["split_seed"])
    if record["splits"]["sha256"] != fingerprint(splits) or record["data"]["sha256"] != data.sha256:
        raise UserError(f"{workdir} was trained on other images or splits than {data.source} gives")
    if split == "test":
        count_test_read(workdir, {"step": trained.step, "checkpoint": checkpoint})
    loss, correct, count = 0.0, 0, 0
    for batch in eval_batches(splits[split], batch_size=trained.config["eval_batch_size"]):
        mask, labels = batch["mask"], batch["label"]
        probabilities = trained.probabilities(batch["image"])
        chosen = np.take_along_axis(probabilities, labels[:, None], axis=1)[mask, 0]
        loss -= float(np.log(np.maximum(chosen, np.finfo(np.float32).tiny)).sum())
        correct += int((probabilities.argmax(1) == labels)[mask].sum())
        count += int(mask.sum())
    return {
        "step": trained.step,
        "loss": loss / count,
        "accuracy": correct / count,
        "count": count,
    }


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
