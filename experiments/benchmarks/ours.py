"""The transfer model in JAX: this package's, and one of Flax's own layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.interleaved import Turns
from experiments.benchmarks.job import (
    LEARNING_RATE,
    Job,
    for_each,
    load_images,
    make_stacks,
    take_turns,
)


def ours(job: Job, turns: Turns) -> None:
    """What the package's commands run: training, prediction, `cifar_jax.features`."""
    if job.work == "features":
        take_turns(turns, _our_features(job), "Backbone.features")
    else:
        _run_jax(job, turns, plain=False)


def plain_jax(job: Job, turns: Turns) -> None:
    """The same calls on a backbone of Flax's own layers."""
    _run_jax(job, turns, plain=True)


def create_ours(job: Job, *, plain: bool = False, compute_dtype: str = "float32"):
    """Returns the notebook's configuration as plain values, and its model, for one device."""
    import jax.numpy as jnp
    from flax import nnx

    from cifar_jax import config as configuration
    from cifar_jax.models.registry import create_model
    from configs import resnet50
    from experiments.benchmarks.plain import PlainBackbone

    config = resnet50.get_config()
    config.batch_size = job.batch_size
    config.model.variant, config.model.upsampling = job.variant, job.upsampling
    config.model.pretrained, config.model.compute_dtype = "none", compute_dtype
    if job.work == "features":
        config.model.head = "pooled"
    config = configuration.to_dict(config)
    model = create_model(config["model"], seed=0)
    if plain:
        model.backbone = PlainBackbone(
            job.variant, dtype=jnp.dtype(compute_dtype), rngs=nnx.Rngs(0)
        )
    return config, model


def _run_jax(job: Job, turns: Turns, *, plain: bool) -> None:
    config, model = create_ours(job, plain=plain)
    if job.work == "train":
        stacks = make_stacks(job)
        training = Training(config, model)
        take_turns(turns, lambda: training(stacks), "JitExecution.train, donated state")
    else:
        from cifar_jax.trained import Trained

        trained = Trained(model, {"config": config}, None)
        batches = np.split(load_images(job)[0], job.calls)
        take_turns(turns, lambda: for_each(trained.logits, batches), "Trained.logits")


class Training:
    """The package's own compiled updates, one a call, and the state that they move."""

    def __init__(self, config: dict[str, Any], model):
        import optax

        from cifar_jax.optim import OptimizerConfig, make_optimizer
        from cifar_jax.parallel import JitExecution
        from cifar_jax.state import create_state

        schedule = optax.constant_schedule(LEARNING_RATE)
        optimizer = make_optimizer(OptimizerConfig(**config["optimizer"]), schedule)
        self.execution = JitExecution()
        self.state = self.execution.place(create_state(model, optimizer, seed=0))

    def __call__(self, stacks: Sequence[Mapping[str, np.ndarray]]) -> float:
        """Makes one update a stack [1, B, ...], and returns the loss before the last."""
        import jax

        for stack in stacks:
            self.state, metrics = self.execution.train(self.state, stack)
        jax.block_until_ready(self.state)
        return float(metrics.loss[0] / metrics.count[0])


def _our_features(job: Job) -> Callable[[], None]:
    from cifar_jax.backbone import Backbone
    from cifar_jax.state import model_leaves, split_model

    config, model = create_ours(job)
    values = {name: np.asarray(x) for name, x in model_leaves(split_model(model)[1]).items()}
    backbone = Backbone(config["model"], values)
    images, _ = load_images(job)

    def work() -> None:
        for _ in backbone.features(images, 0, batch_size=job.batch_size):
            pass

    return work
