"""Means over seeds, of metrics files as runs and hands leave them."""

import pytest

from cifar_jax.errors import UserError
from cifar_jax.recording.run_record import update_run_record
from experiments import seeds

HEADER = "step,validation_accuracy,train_seconds\n"


def write(folder, name, *rows):
    (folder / name).mkdir()
    text = HEADER + "".join(f"{step},{accuracy},{60 * step}\n" for step, accuracy in rows)
    (folder / name / "metrics.csv").write_text(text)


def test_the_last_evaluations_of_all_seeds_are_averaged(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.6, 0.1)):
        write(tmp_path, f"a-b-{seed}", (1, 0.9), (2, accuracy))
    write(tmp_path, "c-0", (3, 0.7))
    write(tmp_path, "c-old", (3, 0.0))  # no seed
    write(tmp_path, "d-0")  # not evaluated yet
    assert seeds.table(seeds.read_sweep(tmp_path)).splitlines()[2:] == [
        "| c | 0.7000 (0.7000) | 3.0 |",
        "| a-b | 0.4000 (0.5000, 0.6000, 0.1000) | 2.0 |",
    ]
    update_run_record(tmp_path / "c-0", result={"step": 3, "test_accuracy": 0.65})
    assert "test" not in seeds.table(seeds.read_sweep(tmp_path))  # but of one run
    for name, accuracy in (("a-b-0", 0.1), ("a-b-1", 0.2), ("a-b-2", 0.6)):
        update_run_record(tmp_path / name, result={"step": 2, "test_accuracy": accuracy})
    assert seeds.table(seeds.read_sweep(tmp_path)).splitlines()[2:] == [
        "| c | 0.7000 (0.7000) | 0.6500 (0.6500) | 3.0 |",
        "| a-b | 0.4000 (0.5000, 0.6000, 0.1000) | 0.3000 (0.1000, 0.2000, 0.6000) | 2.0 |",
    ]


def test_an_unfinished_seed_is_not_averaged_in(tmp_path):
    write(tmp_path, "a-0", (1, 0.5), (2, 0.6))
    write(tmp_path, "a-1", (1, 0.5))
    with pytest.raises(UserError, match=r"the seeds of a end at steps \[1, 2\]"):
        seeds.read_sweep(tmp_path)
