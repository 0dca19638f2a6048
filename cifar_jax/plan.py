"""Step arithmetic: when a run logs, evaluates and saves, and how its steps fall into calls."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from cifar_jax import config as configuration
from cifar_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The run's numbers, durations in steps."""

    seed: int
    batch_size: int
    eval_batch_size: int
    steps_per_call: int
    steps_per_epoch: int
    total: int
    warmup: int
    evaluate_every: int
    log_every: int
    checkpoint_every: int

    def calls(self, start: int) -> Iterator[tuple[int, int]]:
        """Yields (first step, steps) of each call from `start` on."""
        periods = [
            self.steps_per_epoch,
            self.evaluate_every,
            self.log_every,
            self.checkpoint_every,
        ]
        return plan_calls(start, self.total, steps_per_call=self.steps_per_call, periods=periods)


def make_plan(config: Mapping[str, Any], *, train_count: int) -> Plan:
    """Returns the numbers of a run.

    Args:
      config: as `config.to_dict` gives it.
      train_count: images of the training split.

    Raises:
      UserError: for a batch larger than the split, or impossible durations.
    """
    batch_size = config["batch_size"]
    steps_per_epoch = train_count // batch_size
    if not steps_per_epoch:
        raise UserError(
            f"config.batch_size is {batch_size}; expected at most the {train_count} training images"
        )
    steps = configuration.durations_in_steps(config, steps_per_epoch)
    return Plan(
        seed=config["seed"],
        batch_size=batch_size,
        eval_batch_size=config["eval_batch_size"],
        steps_per_call=config["steps_per_call"],
        steps_per_epoch=steps_per_epoch,
        total=steps["train_for"],
        warmup=steps["warmup"],
        evaluate_every=steps["evaluate_every"],
        log_every=steps["log_every"],
        checkpoint_every=steps["checkpoint_every"],
    )


def next_stop(step: int, periods: list[int], total: int) -> int:
    """Returns the first step after `step` that is a multiple of a period, or the last one."""
    return min([total] + [(step // period + 1) * period for period in periods])


def plan_calls(
    start: int, total: int, *, steps_per_call: int, periods: list[int]
) -> Iterator[tuple[int, int]]:
    """Cuts the steps from `start` to `total` into calls.

    A call is as long as `steps_per_call` unless a stop comes first. Where a call ends depends on
    where it starts and on nothing else, so that a run resumed at the end of any call goes on with
    the calls that it would have made.

    Args:
      start: finished steps.
      total: steps of the whole run.
      steps_per_call: the longest call.
      periods: steps between evaluations, saves, rows and epochs; no call crosses a multiple.

    Yields:
      (first step, number of steps) of each call.
    """
    while start < total:
        end = min(start + steps_per_call, next_stop(start, periods, total))
        yield start, end - start
        start = end


def is_due(step: int, period: int, total: int) -> bool:
    """Tells whether `step` finished updates call for what happens every `period` and at the end."""
    return step > 0 and (step % period == 0 or step == total)
