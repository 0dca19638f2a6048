"""The input pipeline: `tf.data` gathers training batches, evaluation slices its split in order.

Batch k is a function of (seed, k) alone: every epoch has a permutation of its own, drawn from the
seed and its number, so that a run starts at any step and hosts agree without speaking. Pixels leave
the host as uint8.
"""

import functools
import os
from collections.abc import Iterable, Iterator

import numpy as np

from cifar_jax.data.content import aligned
from cifar_jax.data.splits import Split


def train_batches(
    split: Split, rows: Iterator[dict[str, np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of each call, prefetched.

    Args:
      split: the training images.
      rows: where those of each call lie, as `train_rows` gives it.

    Yields:
      "image" [steps, B, ...], uint8 pixels or float32 features, and "label" int32 [steps, B].
    """
    # In a notebook nothing else has silenced its notes on CPU features.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # TensorFlow takes seconds to import, and nothing but training pays for it.
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    # Shared memory: `tf.constant` would copy 150 MB twice.
    images = tf.experimental.dlpack.from_dlpack(aligned(split.images).__dlpack__())
    labels = tf.constant(split.labels)

    def gather(call):
        return {"image": tf.gather(images, call["row"]), "label": tf.gather(labels, call["row"])}

    options = tf.data.Options()
    # Constant folding would copy the images into the graph.
    options.experimental_optimization.apply_default_optimizations = False
    # Nothing here can be tuned, and the end of a run might wait a minute for the tuner to wake.
    options.autotune.enabled = False
    signature = {"row": tf.TensorSpec((None, None), tf.int32)}
    dataset = tf.data.Dataset.from_generator(lambda: rows, output_signature=signature).map(gather)
    # One: the loop itself is a call ahead of the device, and a call's images may be many.
    return dataset.with_options(options).prefetch(1).as_numpy_iterator()


def train_rows(
    split: Split,
    calls: Iterable[tuple[int, int]],
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields where the images of this host's share of each call's batches lie.

    An epoch is a permutation of the split; what does not fill a batch at its end is left out, and
    is another part of the split in every epoch.

    Args:
      split: the training images.
      calls: (first step, number of steps) of each call; a call does not cross an epoch.
      batch_size: images of a global batch.
      seed: 0 to 2**32 - 1.
      process_index: this host.
      process_count: hosts; they share a global batch in equal, consecutive parts.

    Yields:
      "row" int32 [steps, batch_size / hosts], of `split.images`.
    """
    share = batch_size // process_count
    columns = slice(process_index * share, (process_index + 1) * share)
    for step, steps in calls:
        rows = call_rows(split, step, steps, batch_size=batch_size, seed=seed)
        yield {"row": rows[:, columns].astype(np.int32)}


def call_rows(split: Split, step: int, steps: int, *, batch_size: int, seed: int) -> np.ndarray:
    """Returns the rows of `split.images` in the global batches of one call, [steps, batch_size].

    Args:
      split: the training images.
      step: the first of the call, which does not cross an epoch.
      steps: of the call.
      batch_size: images of a global batch.
      seed: 0 to 2**32 - 1.
    """
    steps_per_epoch = len(split) // batch_size
    epoch, first = divmod(step, steps_per_epoch)
    order = epoch_order(len(split), seed, epoch)
    chosen = order[first * batch_size : (first + steps) * batch_size]
    return split.indices[chosen].reshape(steps, batch_size)


@functools.lru_cache(maxsize=1)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the epoch's permutation, int64 [count]; 0.5 ms for CIFAR-10."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


def eval_batches(
    split: Split, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this host's share of the split in order, the last batch padded.

    Every host yields equally many batches of equal shape; padding repeats the first image and is
    masked.

    Args:
      split: the images to evaluate.
      batch_size: images of a global batch.
      process_index: this host.
      process_count: hosts; they share a global batch in equal, consecutive parts.

    Yields:
      "image" [batch_size / hosts, ...] as the split has it, "label" int32 and "mask" bool, [same].
    """
    share = batch_size // process_count
    for start in range(0, len(split), batch_size):
        positions = start + process_index * share + np.arange(share)
        mask = positions < len(split)
        chosen = split.indices[np.where(mask, positions, 0)]
        yield {"image": split.images[chosen], "label": split.labels[chosen], "mask": mask}
