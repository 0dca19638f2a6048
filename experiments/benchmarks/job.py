"""What every contender of `resnet.py` does: the same work on the same uint8 images."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cifar_jax.memory import keep_freed_memory, set_up_memory
from experiments.benchmarks import limit
from experiments.benchmarks.interleaved import Turns

WORKS = ("train", "infer", "features")
LEARNING_RATE = 2e-5  # the notebook's
SAMPLE = 2_000  # training images that are shipped
# Pixels of upsampled images in one turn, at least: small ones would be over too soon. Keras's
# steps_per_execution needs several batches.
SHORT_TURN, LONG_TURN = 4 * 256**2, 16 * 256**2


@dataclasses.dataclass(frozen=True)
class Job:
    """What every contender does."""

    work: str  # of WORKS
    upsampling: int  # of 32 pixels, by repetition
    batch_size: int
    variant: str  # of the network: "keras" or "torchvision"
    pixels_a_turn: int = SHORT_TURN

    @property
    def size(self) -> int:
        """Side of the network's input, in pixels."""
        return 32 * self.upsampling

    @property
    def calls(self) -> int:
        """Batches in one turn."""
        return math.ceil(self.pixels_a_turn / (self.batch_size * self.size**2))

    @property
    def images_a_turn(self) -> int:
        """Images in one turn."""
        return self.calls * self.batch_size

    @property
    def flop(self) -> float:
        """Of one image, by formula."""
        return limit.image_flop(self.work, variant=self.variant, upsampling=self.upsampling)


def load_images(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images of one turn, uint8 [N, 32, 32, 3], and their labels, int32 [N]."""
    from cifar_jax.data.sources import load

    data = load("sample")
    return data.train_images[: job.images_a_turn], data.train_labels[: job.images_a_turn]


def make_stacks(job: Job) -> list[dict[str, np.ndarray]]:
    """Returns the batches of one turn, each the stack of one that `JitExecution` takes."""
    shape = (job.calls, 1, job.batch_size)
    images, labels = (array.reshape(*shape, *array.shape[1:]) for array in load_images(job))
    return [{"image": x, "label": y} for x, y in zip(images, labels, strict=True)]


def keeping_memory(contender: Callable[[Any, Turns], None], setting: Any, turns: Turns) -> None:
    """Runs a contender in a process that keeps the memory it frees, as our commands do."""
    keep_freed_memory()
    contender(setting, turns)


def as_command(contender: Callable[[Any, Turns], None], setting: Any, turns: Turns) -> None:
    """Runs a contender of ours in a process that is set up as our commands set up theirs."""
    set_up_memory()
    contender(setting, turns)


def take_turns(turns: Turns, work: Callable[[], Any], settings: str) -> None:
    """Does `work` once to compile what must be compiled, then once a turn; it returns the loss."""
    work()
    for report in turns:
        report |= {"loss": work(), "settings": settings}


def for_each(function: Callable[[Any], Any], batches: list[Any]) -> None:
    """Calls `function` on one batch after the other."""
    for batch in batches:
        function(batch)
