"""Times the whole training loop of the ResNet-50 beside its bare step.

    python -m experiments.benchmarks.loop [--upsampling=2] [--batch-size=32] [--rounds=7]

The loop is a run of `cifar_jax.main` from the notebook's configuration: `tf.data`, metrics, a row
every 10 steps, all its files, and a checkpoint at the end of every turn, which is waited for. The
bare step makes the same compiled calls on batches that lie ready.
"""

import functools
import os
import tempfile
from pathlib import Path

from cifar_jax.data.sources import load
from cifar_jax.errors import exit_on_user_error
from experiments.benchmarks import interleaved
from experiments.benchmarks.command import add_size, make_parser, read_job, written_by
from experiments.benchmarks.interleaved import Turns
from experiments.benchmarks.job import Job, as_command, make_stacks, take_turns
from experiments.benchmarks.ours import Training, create_ours

STEPS = 50  # in a turn
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "optax", "tensorflow-cpu", "numpy")


def whole_loop(job: Job, turns: Turns) -> None:
    """A run without end, held up after every turn; its checkpoint is on disk then."""
    from cifar_jax.loop import Loop
    from cifar_jax.train import train_and_evaluate
    from configs import resnet50

    finish_edge = Loop.finish_edge

    def finish_edge_and_wait(loop: Loop) -> None:
        finish_edge(loop)
        if loop.step and loop.step % STEPS == 0:
            loop.checkpointer.wait()
            next(turns)

    Loop.finish_edge = finish_edge_and_wait
    config = resnet50.get_config()
    config.batch_size, config.model.upsampling = job.batch_size, job.upsampling
    config.model.pretrained = "none"
    config.train_for = config.evaluate_every = "1000 epochs"
    config.log_every, config.checkpoint_every = "10 steps", f"{STEPS} steps"
    with tempfile.TemporaryDirectory() as workdir:
        train_and_evaluate(config, workdir)


def bare_step(job: Job, turns: Turns) -> None:
    """The compiled calls alone."""
    config, model = create_ours(job)
    training = Training(config, model)
    stack = make_stacks(job)[0]
    take_turns(turns, lambda: training([stack] * STEPS), "JitExecution.train")


def main() -> None:
    """Runs the benchmark and writes its results."""
    parser = make_parser(__doc__)
    add_size(parser, upsampling=2, batch_size=32)
    options = parser.parse_args()
    job = read_job(parser, options)
    machine = interleaved.describe_machine(PACKAGES)
    load()  # missing images are told, or fetched, before anybody has set up
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    contenders = {
        "bare step": functools.partial(as_command, bare_step, job),
        "whole loop": functools.partial(as_command, whole_loop, job),
    }
    interleaved.write_comparison(
        options.results or RESULTS / f"loop_{job.size}px_batch{job.batch_size}",
        interleaved.run(contenders, rounds=options.rounds),
        base="bare step",
        title=f"The training loop beside its step: {job.size} px, batch {job.batch_size}",
        about=f"{written_by()}; {options.rounds} rounds of {STEPS} steps and one checkpoint.",
        job=vars(job),
        machine=machine,
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
