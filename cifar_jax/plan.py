"""Step arithmetic: when a run logs, evaluates and saves, and how its steps fall into calls."""

from collections.abc import Iterator


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
