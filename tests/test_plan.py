"""Step arithmetic, against counting one step at a time."""

import hypothesis
import hypothesis.strategies as st

from cifar_jax.durations import Duration
from cifar_jax.plan import is_due, plan_calls

PERIODS = st.lists(st.integers(1, 40), min_size=1, max_size=4)
STOPS = st.lists(st.integers(0, 250), max_size=3)


@hypothesis.given(st.integers(0, 200), st.integers(1, 200), st.integers(1, 50), PERIODS, STOPS)
def test_calls_cover_every_step_once_and_cross_no_edge(
    start, total, steps_per_call, periods, stops
):
    edges = {"periods": periods, "stops": stops}
    calls = list(plan_calls(start, total, steps_per_call=steps_per_call, **edges))
    covered = [step for first, steps in calls for step in range(first, first + steps)]
    assert covered == list(range(start, total))
    for first, steps in calls:
        assert 1 <= steps <= steps_per_call
        inner = range(first + 1, first + steps)
        assert not [step for step in inner if any(step % period == 0 for period in periods)]
        assert not set(inner) & set(stops)


@hypothesis.given(st.integers(1, 200), st.integers(1, 50), PERIODS, STOPS, st.data())
def test_a_run_resumed_at_any_edge_makes_the_same_calls(
    total, steps_per_call, periods, stops, data
):
    options = {"steps_per_call": steps_per_call, "periods": periods, "stops": stops}
    calls = list(plan_calls(0, total, **options))
    number = data.draw(st.integers(0, len(calls) - 1))
    resumed = plan_calls(calls[number][0], total, **options)
    assert list(resumed) == calls[number:]


@hypothesis.settings(deadline=None)  # the time of a test says nothing here
@hypothesis.given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 12), st.integers(1, 12))
def test_periods_in_parts_of_an_epoch_end_with_the_run(steps_per_epoch, tenths, repeats, calls):
    """So many times "1.5 epochs" are as many steps as "4.5 epochs": nothing is due just before."""
    period = Duration.parse(f"{tenths / 10} epochs", key="evaluate_every")
    total = Duration.parse(f"{tenths * repeats / 10} epochs", key="train_for")
    every, total = period.exact_steps(steps_per_epoch), total.steps(steps_per_epoch)
    hypothesis.assume(every >= 1)
    due = [step for step in range(total + 1) if is_due(step, every, total)]
    assert len(due) == repeats and due[-1] == total
    assert all(abs(step - number * every) <= 0.5 for number, step in enumerate(due, start=1))
    edges = {"steps_per_call": calls, "periods": [every], "stops": []}
    ends = {first + steps for first, steps in plan_calls(0, total, **edges)}
    assert set(due) <= ends


def test_what_is_due_at_the_ends():
    due = [step for step in range(11) if is_due(step, 4, total=10)]
    assert due == [4, 8, 10]  # not before the first update, and once more at the end


def test_a_tiny_number_is_read_at_once():
    """As a fraction of its text it would have ten million digits."""
    assert Duration.parse("1e-9999999 epochs", key="schedule.warmup").steps(1000) == 0
