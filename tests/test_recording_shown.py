"""What a run shows: progress on a terminal or in a pipe, and figures."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from PIL import Image

from cifar_jax.errors import RunError
from cifar_jax.recording import figures
from cifar_jax.recording.progress import Counter, Progress
from cifar_jax.recording.recorder import open_recorder

# Progress

RUN = {"total_steps": 300, "steps_per_epoch": 100, "batch_size": 32, "start_step": 0}


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("cifar_jax.recording.progress.time.monotonic", lambda: now[0])
    return now


def report(progress, step, seconds, steps=50):
    progress.update(step, loss=2.5, accuracy=0.125, seconds=seconds, steps=steps)


def test_piped_lines_come_at_epoch_ends(clock):
    stream = io.StringIO()
    progress = Progress(**RUN, stream=stream)
    report(progress, 50, 0.5)
    assert stream.getvalue() == ""
    report(progress, 100, 0.5)
    progress.message("saved")
    report(progress, 150, 0.25)
    report(progress, 200, 0.25)
    progress.close()
    # 100 steps in 1 s, then 200 in 1.5 s: 4,267 images/s, and 100 steps left take 0.75 s.
    assert stream.getvalue().splitlines() == [
        "epoch 1/3 step 100/300 ETA 00:02 3.20k img/s loss 2.5000 acc 0.1250",
        "saved",
        "epoch 2/3 step 200/300 ETA 00:00 4.27k img/s loss 2.5000 acc 0.1250",
    ]


def test_piped_lines_of_what_has_no_steps(clock):
    stream = io.StringIO()
    counter = Counter("features", total=1000, start=200, stream=stream)
    for seconds in (10, 25, 20, 20):
        clock[0] += seconds
        counter.update(200)
    # The first update, whose time compiles, is left out of the speed: 200 images in 25 s, then
    # 600 in 65 s.
    assert stream.getvalue().splitlines() == [
        "features: 600/1,000 images, 8.0 img/s, ETA 00:50",
        "features: 1,000/1,000 images, 9.2 img/s, ETA 00:00",
    ]


def test_an_evaluation_that_takes_long_is_shown(clock, tmp_path, capsys):
    batches = [{"mask": np.arange(100) < count} for count in (100, 100, 100, 50)]
    with open_recorder(tmp_path, title="", start_rows=0, **RUN) as recorder:
        for seconds in (0.1, 20.0):
            passed = []
            for batch in recorder.counted(iter(batches), name="test", total=350):
                passed.append(batch)
                clock[0] += seconds
            assert passed == batches
    assert capsys.readouterr().err.splitlines() == [
        "evaluation on the test split: 200/350 images, 5.0 img/s, ETA 00:30",
        "evaluation on the test split: 350/350 images, 4.2 img/s, ETA 00:00",
    ]


def test_what_was_done_at_once_leaves_no_line(clock):
    stream = io.StringIO()
    counter = Counter("features", total=400, start=0, stream=stream)
    for _ in range(4):
        clock[0] += 5
        counter.update(100)
    assert stream.getvalue() == ""


def test_the_time_left_counts_larger_images_as_they_cost(clock):
    stream = io.StringIO()
    progress = Progress(**RUN, costs=[(0, 4), (200, 16)], stream=stream)
    report(progress, 100, 1.0, steps=100)
    report(progress, 250, 3.0, steps=150)  # 100 of the first size, 50 of the second
    report(progress, 300, 1.0, steps=50)
    # 100 steps at the same speed and 100 at a quarter of it; then 50 that took 2 of the 3 seconds.
    expected = ["ETA 00:05 3.20k", "ETA 00:02", "ETA 00:00"]
    lines = stream.getvalue().splitlines()
    assert all(text in line for text, line in zip(expected, lines, strict=True))


def test_the_speed_is_that_of_the_last_minutes(clock):
    stream = io.StringIO()
    progress = Progress(**{**RUN, "steps_per_epoch": 300}, stream=stream)
    for step in range(1, 101):
        report(progress, step, 1.0, steps=1)
    clock[0] += 600
    for step in range(101, 121):
        report(progress, step, 30.0, steps=1)
    clock[0] += 600
    report(progress, 121, 30.0, steps=1)
    assert re.search(r"step 121/300 ETA 1:29:\d\d 1.07 img/s ", stream.getvalue())


def test_piped_lines_of_a_slow_model_come_every_30_seconds(clock):
    stream = io.StringIO()
    progress = Progress(**{**RUN, "start_step": 100, "steps_per_epoch": 140}, stream=stream)
    for step in range(101, 111):
        clock[0] += 10
        report(progress, step, 10.0, steps=1)
    lines = stream.getvalue().splitlines()
    assert [re.search(r"step (\d+)", line)[1] for line in lines] == ["103", "106", "109"]
    assert lines[-1].startswith("epoch 1/3 ")
    assert " ETA 31:50 3.20 img/s " in lines[-1]
    report(progress, 290, 10.0, steps=180)
    report(progress, 300, 1.0, steps=10)  # the last step, whatever the clock and within an epoch
    assert "step 300/300" in stream.getvalue()


def read_to_end(master):
    """What was written to a terminal whose other end is closed."""
    parts = []
    with contextlib.suppress(OSError), open(master, "rb", buffering=0) as file:  # EIO is the end
        while part := file.read(65536):
            parts.append(part)
    return b"".join(parts).decode()


def open_terminal(columns):
    """Both ends of a terminal: where its output is read, where programs write."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return master, open(slave, "w")


def test_terminal_shows_a_bar_that_messages_do_not_tear():
    master, stream = open_terminal(120)
    with stream:
        progress = Progress(**{**RUN, "start_step": 100}, stream=stream)
        report(progress, 150, 0.5)
        progress.message("checkpoint saved")
        report(progress, 250, 1.0, steps=100)
        progress.close()
    output = read_to_end(master)
    lines = [line.strip("\r") for line in output.split("\n")]
    drawn = [part for line in lines for part in line.split("\r")]
    assert "checkpoint saved" in drawn  # alone on its line
    assert max(len(part) for part in drawn) <= 120
    last = [part for part in drawn if part.strip()][-1]
    assert re.fullmatch(
        r"epoch 3/3 \|.{50,}\| 250/300 ETA 00:00 3.20k img/s loss 2.5000 acc 0.1250", last
    )
    filled, empty = re.search(r"\|(\S+)(\s*)\|", last).groups()
    assert len(filled) / len(filled + empty) == pytest.approx(250 / 300, abs=0.02)
    assert any(re.match(r"epoch 1/3 \|.*\| 100/300", part) for part in drawn)
    assert all("img/s" in part for part in drawn if " 150/300" in part)
    assert output.endswith("\n")


@pytest.mark.parametrize(
    "batch_size, seconds, speed",
    [
        (32, 0.05, r"\d\d:\d\d 64.0k"),
        (1, 100, r"5:52:30 1.00"),
        (999, 1, r"\d\d:\d\d 99.9k"),
    ],
)
def test_80_columns_show_everything(batch_size, seconds, speed):
    """Five digits of steps, three of epochs: nothing is cut off."""
    run = {"total_steps": 33_750, "steps_per_epoch": 337, "batch_size": batch_size}
    master, stream = open_terminal(80)
    with stream:
        progress = Progress(**run, start_step=12_500, stream=stream)
        report(progress, 12_600, seconds, steps=100)
        progress.close()
    drawn = [part for part in re.split(r"[\r\n]+", read_to_end(master)) if part.strip()]
    assert max(len(part) for part in drawn) <= 80
    assert re.fullmatch(
        rf"epoch 38/101 \|.+\| 12600/33750 ETA {speed} img/s loss 2.5000 acc 0.1250", drawn[-1]
    )


# Figures

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def evaluations(epochs, metrics=("train_accuracy", "validation_accuracy")):
    return [
        {"step": 4 * e, "epoch": float(e), "event": "evaluation"}
        | {name: e / (9 + i) for i, name in enumerate(metrics)}
        for e in range(1, epochs + 1)
    ]


def count_pixels(path, colour):
    """Pixels of a colour in the left panel (accuracy) and in the right one (loss)."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    hits = np.abs(pixels - colour).max(axis=-1) < 8
    return hits[:, : hits.shape[1] // 2].sum(), hits[:, hits.shape[1] // 2 :].sum()


def test_curves_show_even_one_epoch(tmp_path):
    empty, one, ten = (tmp_path / f"{n}.png" for n in (0, 1, 10))
    figures.draw_curves([evaluations(1)[0] | {"event": "train"}], empty, "nothing yet")
    figures.draw_curves(evaluations(1), one, "one")
    with_nan = [*evaluations(10), evaluations(11)[-1] | {"train_accuracy": np.nan}]
    figures.draw_curves(with_nan, ten, "$x")
    for colour in (BLUE, ORANGE):
        legend, _ = count_pixels(empty, colour)
        assert legend > 0
        assert count_pixels(one, colour)[0] > legend + 20
        assert count_pixels(ten, colour)[0] > count_pixels(one, colour)[0] + 200
        # No losses were given: nothing but the legend there.
        assert count_pixels(ten, colour)[1] == count_pixels(empty, colour)[1]
    assert sorted(os.listdir(tmp_path)) == ["0.png", "1.png", "10.png"]


def test_comparison_draws_every_run(tmp_path):
    runs = {"first": evaluations(5), "_second": evaluations(8), "empty": []}
    figures.draw_comparison(runs, tmp_path / "both.png")
    figures.draw_comparison({**runs, "_second": []}, tmp_path / "one.png")
    for colour, added in ((BLUE, False), (ORANGE, True)):
        both = count_pixels(tmp_path / "both.png", colour)[0]
        assert (both > count_pixels(tmp_path / "one.png", colour)[0] + 200) == added


def test_figure_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(RunError, match="missing/curves.png: cannot be written"):
        figures.draw_curves(evaluations(1), tmp_path / "missing" / "curves.png", "title")


def test_figures_need_no_display_and_load_matplotlib_late(tmp_path):
    code = (
        "import sys\n"
        "from cifar_jax.recording import figures\n"
        "import cifar_jax.report\n"
        "print(sorted({'matplotlib', 'jax'} & set(sys.modules)))\n"
        f"figures.draw_curves([], {str(tmp_path / 'x.png')!r}, 'title')\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "DISPLAY")}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert run.stdout.split() == ["[]", "False"]
