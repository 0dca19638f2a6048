"""Step arithmetic: when a run logs, evaluates and saves, and how its steps fall into calls."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from cifar_jax import config as configuration
from cifar_jax.durations import Duration, nearest_step
from cifar_jax.errors import UserError
from cifar_jax.phases import FREEZE, PROGRESSIVE, Phase, make_phases

INT32_MAX = 2**31 - 1  # of the state's step counter


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
    evaluate_every: Fraction  # what comes again and again falls on the nearest steps
    log_every: Fraction
    checkpoint_every: Fraction
    phases: tuple[Phase, ...]

    def calls(self, start: int) -> Iterator[tuple[int, int]]:
        """Yields (first step, steps) of each call from `start` on."""
        periods = [
            self.steps_per_epoch,
            self.evaluate_every,
            self.log_every,
            self.checkpoint_every,
        ]
        return plan_calls(
            start,
            self.total,
            steps_per_call=self.steps_per_call,
            periods=periods,
            stops=[phase.start for phase in self.phases],
        )

    def phase(self, step: int) -> Phase:
        """Returns the phase of the update after `step` updates."""
        return [phase for phase in self.phases if phase.start <= step][-1]


def make_plan(config: Mapping[str, Any], *, train_count: int) -> Plan:
    """Returns the numbers of a run.

    Args:
      config: as `config.to_dict` gives it.
      train_count: images of the training split.

    Raises:
      UserError: for a batch larger than the split, for impossible durations, or where the run or
        a phase would end between two updates.
    """
    batch_size = config["batch_size"]
    steps_per_epoch = train_count // batch_size
    if not steps_per_epoch:
        raise UserError(
            f"config.batch_size is {batch_size}; expected at most the {train_count} training images"
        )
    steps = durations_in_steps(config, steps_per_epoch)
    phases = make_phases(config, steps_per_epoch=steps_per_epoch, total=steps["train_for"])
    _check_updates(config["optimizer"]["accumulate"], steps["train_for"], phases)
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
        phases=tuple(phases),
    )


def _check_updates(steps_an_update: int, total: int, phases: Iterable[Phase]) -> None:
    """Refuses a run or phase that would end between two updates."""
    ends = [(total, "train_for")]
    ends += [(phase.start, f"{FREEZE} or config.{PROGRESSIVE}") for phase in phases]
    for step, key in ends:
        if step % steps_an_update:
            raise UserError(
                f"config.optimizer.accumulate is {steps_an_update}; expected a divisor of "
                f"{step}, the steps up to an end in config.{key} (ends in epochs are cut to "
                "whole updates)"
            )


def durations_in_steps(
    config: Mapping[str, Any], steps_per_epoch: int
) -> dict[str, int | Fraction]:
    """Returns every duration of `config` in steps, keyed as in the configuration.

    "train_for" and "warmup" are whole numbers; what comes again and again is exact.

    Raises:
      UserError: for a period that comes out below one step.
    """
    texts = {key: config[key] for key in configuration.PERIODS}
    durations = {key: Duration.parse(text, key=key) for key, text in texts.items()}
    steps = {key: each.exact_steps(steps_per_epoch) for key, each in durations.items()}
    for key, value in steps.items():
        if value > INT32_MAX:
            raise UserError(f'config.{key} is "{texts[key]}"; expected at most {INT32_MAX} steps')
        if value < 1:
            raise UserError(
                f'config.{key} is "{texts[key]}"; that is less than one step '
                f"(an epoch has {steps_per_epoch})"
            )
    steps_an_update = config["optimizer"]["accumulate"]
    steps["train_for"] = durations["train_for"].steps(
        steps_per_epoch, steps_an_update=steps_an_update
    )
    if not steps["train_for"]:
        raise UserError(
            f'config.train_for is "{texts["train_for"]}"; that is less than one update of '
            f"{steps_an_update} steps (config.optimizer.accumulate)"
        )
    warmup = Duration.parse(config["schedule"]["warmup"], key="schedule.warmup")
    steps["warmup"] = warmup.steps(steps_per_epoch, steps_an_update=steps_an_update)
    if steps["warmup"] > steps["train_for"]:
        raise UserError(
            f"config.schedule.warmup is {steps['warmup']} steps; the whole run "
            f"(config.train_for) has {steps['train_for']}"
        )
    return steps


def next_stop(step: int, periods: list[Fraction | int], total: int) -> int:
    """Returns the first step after `step` at which a period ends, or the last one."""
    return min([total] + [nearest_step((_ended(step, p) + 1) * p) for p in periods])


def _ended(step: int, period: Fraction | int) -> int:
    """Returns how many periods have ended after `step` updates, each at its nearest step."""
    # floor((step + 1/2) / period), in whole numbers: it is asked for several times a step.
    return (2 * step + 1) * period.denominator // (2 * period.numerator)


def plan_calls(
    start: int, total: int, *, steps_per_call: int, periods: list[Fraction | int], stops: list[int]
) -> Iterator[tuple[int, int]]:
    """Cuts the steps from `start` to `total` into calls.

    A call is as long as `steps_per_call` unless a stop comes first. Where a call ends depends on
    where it starts and on nothing else, so that a run resumed at the end of any call goes on with
    the calls that it would have made.

    Args:
      start: finished steps.
      total: steps of the whole run.
      steps_per_call: the longest call.
      periods: steps between evaluations, saves, rows and epochs; no call crosses the end of one.
      stops: steps that no call crosses either.

    Yields:
      (first step, number of steps) of each call.
    """
    while start < total:
        edge = min([next_stop(start, periods, total), *(stop for stop in stops if stop > start)])
        end = min(start + steps_per_call, edge)
        yield start, end - start
        start = end


def is_due(step: int, period: Fraction | int, total: int) -> bool:
    """Tells whether `step` finished updates call for what happens every `period` and at the end."""
    return step > 0 and (_ended(step, period) > _ended(step - 1, period) or step == total)
