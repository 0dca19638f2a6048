"""Devices: how the pure steps are compiled and where their arrays lie.

`JitExecution` (default) is one program over a one-axis mesh: the batch is sharded, the state
replicated, and the compiler inserts the reductions. `PmapExecution` runs one program a device and
reduces by name. Both make the same updates, up to rounding: over several devices the compilers of
TPUs and GPUs sum bfloat16 compute's gradients in bfloat16 for the former. One call takes a stack
of batches.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cifar_jax.errors import UserError, one_line
from cifar_jax.metrics import Metrics
from cifar_jax.state import TrainState
from cifar_jax.steps import eval_step, train_step

AXIS = "data"
HostBatch = Mapping[str, np.ndarray]


def scan_train_steps(
    state: TrainState,
    batches: Mapping[str, jax.Array],
    dataset: Mapping[str, jax.Array] | None = None,
    *,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """Runs `train_step` over a stack of batches [steps, B, ...]; metrics come back as [steps].

    With a `dataset` a batch is {"row": int32 [B]}, the rows of its "image" and "label".
    """

    def step(state, batch):
        if dataset is not None:
            batch = {name: array[batch["row"]] for name, array in dataset.items()}
        return train_step(state, batch, axis_name=axis_name)

    if len(jax.tree.leaves(batches)[0]) > 1:
        return jax.lax.scan(step, state, batches)
    # A loop of one is no loop: convolutions that were in one XLA does not give to its fast library
    # for the CPU (a step takes 13 to 19 times as long).
    state, metrics = step(state, jax.tree.map(lambda x: x[0], dict(batches)))
    return state, jax.tree.map(lambda x: x[jnp.newaxis], metrics)


class JitExecution:
    """Global arrays under `jax.jit` with `NamedSharding`."""

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        mesh = _one_axis_mesh(devices or jax.devices())
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.batch_sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        self.stack_sharding = NamedSharding(mesh, PartitionSpec(None, AXIS))
        self.compiled_train = jax.jit(
            scan_train_steps, donate_argnums=0, out_shardings=self.replicated
        )
        self.compiled_eval = jax.jit(eval_step, out_shardings=self.replicated)
        self.dataset = None

    def place(self, state: TrainState) -> TrainState:
        """Puts a state of host arrays on every device."""
        return jax.device_put(state, self.replicated)

    def keep(self, dataset: HostBatch) -> None:
        """Puts a whole set on every device; the batches of `train` are then rows of it."""
        self.dataset = jax.device_put(dict(dataset), self.replicated)

    def compile_train(self, state: TrainState, batches: HostBatch) -> None:
        """Compiles what `train` runs for these shapes; JAX keeps it for the calls."""
        batches = self._put(batches, self.stack_sharding)
        self.compiled_train.lower(state, batches, self.dataset).compile()

    def train(self, state: TrainState, batches: HostBatch) -> tuple[TrainState, Metrics]:
        """Runs the steps of one call; gives `state`'s buffers away. `batches`: [steps, B, ...]."""
        batches = self._put(batches, self.stack_sharding)
        return self.compiled_train(state, batches, self.dataset)

    def evaluate(self, state: TrainState, batch: HostBatch) -> Metrics:
        """Returns the metrics of this host's share [B, ...] of one global batch."""
        return self.compiled_eval(state, self._put(batch, self.batch_sharding))

    def to_host_tree(self, state: TrainState) -> TrainState:
        """Returns the state without any device axis, ready to be copied to the host."""
        return state

    def _put(self, batch: HostBatch, sharding: NamedSharding) -> dict[str, jax.Array]:
        put = functools.partial(jax.make_array_from_process_local_data, sharding)
        return {name: put(array) for name, array in batch.items()}


class PmapExecution:
    """One replica a device under `jax.pmap`; the state has a leading device axis."""

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        self.devices = devices or jax.local_devices()
        mesh = _one_axis_mesh(self.devices)
        self.replica_sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        mapped = functools.partial(jax.pmap, axis_name=AXIS, devices=devices)
        self.compiled_train = mapped(
            functools.partial(scan_train_steps, axis_name=AXIS),
            in_axes=(0, 0, None),
            donate_argnums=0,
        )
        self.compiled_eval = mapped(functools.partial(eval_step, axis_name=AXIS))
        self.dataset = None

    def place(self, state: TrainState) -> TrainState:
        """Puts a state of host arrays on every device."""
        copies = jax.tree.map(
            lambda x: np.broadcast_to(x, (len(self.devices), *np.shape(x))), state
        )
        return jax.device_put(copies, self.replica_sharding)

    def keep(self, dataset: HostBatch) -> None:
        """Puts a whole set on every device; the batches of `train` are then rows of it."""
        self.dataset = jax.device_put(dict(dataset), self.replicated)

    def compile_train(self, state: TrainState, batches: HostBatch) -> None:
        """Compiles what `train` runs for these shapes; JAX keeps it for the calls."""
        self.compiled_train.lower(state, self._put_stack(batches), self.dataset).compile()

    def train(self, state: TrainState, batches: HostBatch) -> tuple[TrainState, Metrics]:
        """Runs the steps of one call; gives `state`'s buffers away. `batches`: [steps, B, ...]."""
        state, metrics = self.compiled_train(state, self._put_stack(batches), self.dataset)
        return state, self.to_host_tree(metrics)

    def evaluate(self, state: TrainState, batch: HostBatch) -> Metrics:
        """Returns the metrics of this host's share [B, ...] of one global batch."""
        split = {name: self._split(x, 0) for name, x in batch.items()}
        split = jax.device_put(split, self.replica_sharding)
        return self.to_host_tree(self.compiled_eval(state, split))

    def to_host_tree(self, state: Any) -> Any:
        """Returns the first replica: a checkpoint holds no device axis."""
        # Its own shard: `x[0]` of the whole would put a copy of the result on every device.
        return jax.tree.map(lambda x: x.addressable_shards[0].data[0], state)

    def _put_stack(self, batches: HostBatch) -> dict[str, jax.Array]:
        """Cuts [steps, B, ...] into [devices, steps, B / devices, ...], each to its device."""
        split = {name: np.moveaxis(self._split(x, 1), 1, 0) for name, x in batches.items()}
        return jax.device_put(split, self.replica_sharding)

    def _split(self, array: np.ndarray, axis: int) -> np.ndarray:
        """Cuts the batch axis [..., B, ...] into [..., devices, B / devices, ...]."""
        shape = array.shape
        return array.reshape(*shape[:axis], len(self.devices), -1, *shape[axis + 1 :])


def _one_axis_mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    # Auto: the compiler propagates the shardings and inserts the reductions.
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=auto, devices=devices)


def create_execution(
    name: str, devices: Sequence[jax.Device] | None = None
) -> JitExecution | PmapExecution:
    """Returns the execution that `config.execution` names, on all devices or the given ones."""
    return {"jit": JitExecution, "pmap": PmapExecution}[name](devices)


def check_devices() -> None:
    """Raises `UserError` where JAX finds no device."""
    try:
        jax.devices()
    # Whatever a driver or a plug-in raises.
    except Exception as error:
        platforms = f"JAX_PLATFORMS is {jax.config.jax_platforms or 'not set'}"
        raise UserError(f"JAX finds no device ({one_line(error)}); {platforms}") from error


def check_batch_size(batch_size: int, *, key: str) -> None:
    """Refuses a global batch that the devices cannot share equally.

    Raises:
      UserError: naming `key`.
    """
    devices = jax.device_count()
    if batch_size % devices:
        raise UserError(
            f"config.{key} is {batch_size}; expected a multiple of the {devices} devices"
        )
