"""Tables of runs, and a run beside the notebook."""

import json

import pytest
from PIL import Image

from cifar_jax import report
from cifar_jax.recording.metrics_log import MetricsLog
from cifar_jax.recording.run_record import update_run_record

SIZES = {"train": 36_000, "validation": 4_000, "test": 10_000}


def make_record(model="mlp", *, is_sample=False, result=True, source="cifar-10-batches-bin in d"):
    record = {
        "config": {"model": {"name": model}},
        "data": {"source": source, "is_sample": is_sample, "sha256": {}},
        "splits": {"protocol": "notebook", "sizes": SIZES, "sha256": "0", "duplicates": 0},
        "parameters": 1_579_410,
        "total_steps": 30,
    }
    if result:
        record["result"] = {
            "test_accuracy": 0.43215,
            "test_loss": 1.6,
            "test_count": 10_000,
            "train_seconds": 12.34,
            "step": 20,
        }
    return record


ROWS = [
    {"step": 20, "epoch": 2.0, "event": "train", "train_accuracy": 0.99},
    *(
        {
            "step": 10 * epoch,
            "epoch": float(epoch),
            "event": "evaluation",
            "train_accuracy": 0.4 + epoch / 100,
            "validation_accuracy": 0.3 + epoch / 100,
            "validation_loss": 2.0 - epoch / 10,
            "train_seconds": 6.17 * epoch,
        }
        for epoch in (1, 2, 3)
    ),
]


def write_run(workdir, record, rows=ROWS):
    workdir.mkdir(parents=True)
    update_run_record(workdir, **record)
    log = MetricsLog(workdir, resume_step=0, resume_rows=0)
    for row in rows:
        log.write(row)
    log.close()
    return str(workdir)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_accuracies_are_those_of_the_tested_step():
    assert report.accuracies(make_record(), ROWS) == pytest.approx(
        {"train": 0.42, "validation": 0.32, "test": 0.43215}
    )
    unfinished = report.accuracies(make_record(result=False), ROWS)
    assert unfinished == pytest.approx({"train": 0.43, "validation": 0.33})
    assert report.accuracies(make_record(result=False), []) == {}


@pytest.mark.parametrize(
    "model, notebook",
    [
        ("mlp", ["notebook", "0.3748", "0.3550", "not", "stated"]),
        ("resnet50", ["notebook", "not", "stated", "0.9405", "0.9366"]),
    ],
)
def test_notebook_table(model, notebook):
    lines = report.notebook_table(make_record(model), ROWS).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["accuracy", "train", "validation", "test"],
        ["images", "36,000", "4,000", "10,000"],
        ["this", "run", "0.4200", "0.3200", "0.4321"],
        notebook,
    ]
    assert len({len(line) for line in lines[:4]}) == 1  # columns stand below each other
    assert lines[4:] == [f"model {model}, data: cifar-10-batches-bin in d"]


def test_notebook_table_says_that_the_data_is_a_sample():
    text = report.notebook_table(make_record(is_sample=True, result=False), ROWS)
    assert "SAMPLE" in text and "not read" in text
    assert "SAMPLE" not in report.notebook_table(make_record(), ROWS)


def test_model_that_the_notebook_does_not_have():
    assert "notebook" not in report.notebook_table(make_record("other"), ROWS)


def test_command_prints_a_markdown_table_and_draws_a_figure(tmp_path, capsys):
    finished = write_run(tmp_path / "finished", make_record())
    sample = write_run(
        tmp_path / "sample", make_record(is_sample=True, result=False, source="a|b"), ROWS[:2]
    )
    report.main([finished, f"{sample}/", f"--figure={tmp_path}/runs.png"])
    lines = capsys.readouterr().out.replace("\\|", "/").splitlines()
    assert cells(lines[0]) == [*report.COLUMNS]
    assert set(lines[1]) <= set("|-: ")
    assert cells(lines[2]) == [
        *("finished", "mlp", "cifar-10-batches-bin in d", "2"),
        *("0.4200", "0.3200", "0.4321", "12.3", "1,579,410"),
    ]
    assert cells(lines[3]) == [
        *("sample", "mlp", "a/b (SAMPLE)", "1"),
        *("0.4100", "0.3100", "-", "unfinished", "1,579,410"),
    ]
    assert len({len(cells(line)) for line in lines}) == 1
    with Image.open(tmp_path / "runs.png") as figure:
        assert figure.format == "PNG"


def test_a_tilde_is_the_home(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_run(tmp_path / "run", make_record())
    report.main(["~/run", "--figure=~/runs.png"])
    assert cells(capsys.readouterr().out.splitlines()[2])[0] == "run"
    assert (tmp_path / "runs.png").exists()


def test_what_is_no_run_beside_runs_is_left_out(tmp_path, capsys):
    """`runs/*` holds a sweep's own table, and the folders of sweeps."""
    run = write_run(tmp_path / "run", make_record())
    write_run(tmp_path / "sweep" / "run", make_record())
    others = [str(tmp_path / "sweep.md"), str(tmp_path / "sweep")]
    (tmp_path / "sweep.md").write_text("| run |")
    report.main([run, *others])
    told = capsys.readouterr()
    assert [cells(line)[0] for line in told.out.splitlines()[2:]] == ["run"]
    assert f"{others[0]} is a file, not the --workdir of a run; left out" in told.err
    assert f"{others[1]} has no run.json, which every run has; left out" in told.err
    for given, message in ((others, "no run is left"), (others[:1], "run.json: not found; give")):
        with pytest.raises(SystemExit) as caught:
            report.main(given)
        assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_loop_of_links_is_one_line(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(SystemExit) as caught:
        report.main([str(tmp_path / "loop")])
    told = capsys.readouterr().err
    assert caught.value.code == 2 and str(tmp_path / "loop") in told and told.count("\n") == 1


def test_dollars_in_a_name_are_no_mathematics(tmp_path, capsys):
    runs = [write_run(tmp_path / name, make_record()) for name in ("$lr_{$", "$5 and $6")]
    report.main([*runs, f"--figure={tmp_path}/runs.png"])
    assert (tmp_path / "runs.png").exists()


def test_runs_of_the_same_name_are_told_by_path(tmp_path, capsys):
    paths = [write_run(tmp_path / seed / "run", make_record()) for seed in ("0", "1")]
    report.main(paths)
    lines = capsys.readouterr().out.splitlines()
    assert [cells(line)[0] for line in lines[2:]] == paths


def test_run_without_metrics(tmp_path, capsys):
    report.main([write_run(tmp_path / "new", make_record(result=False), [])])
    assert cells(capsys.readouterr().out.splitlines()[2])[3:7] == ["-"] * 4


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent", None, "run.json: not found"),
        (
            "run.json",
            "{}",
            "run.json: has no valid config.model.name, data.source, data.is_sample, parameters, "
            "total_steps;",
        ),
        *(
            (
                "run.json",
                json.dumps(make_record() | {field: value}),
                f"run.json: has no valid {bad}",
            )
            for field, value, bad in [
                ("config", {}, "config.model.name"),
                ("config", {"model": "mlp"}, "config.model.name"),
                ("data", None, "data.source, data.is_sample"),
                ("data", {"source": 1, "is_sample": True}, "data.source"),
                ("parameters", "many", "parameters"),
                ("result", {"test_accuracy": "0.4"}, "result.test_accuracy"),
                ("result", 3, "result"),
                ("starts", 3, "starts"),
                ("result", {"train_seconds": []}, "result.train_seconds"),
            ]
        ),
        ("run.json", "{", "run.json: not valid JSON"),
        ("run.json", "3", "run.json: expected a JSON object"),
    ],
)
def test_bad_run_is_one_line(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as raised:
        report.main([str(tmp_path)])
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(("total", "seconds"), [(30, "18.5"), (40, "unfinished")])
@pytest.mark.parametrize("result", [None, {}])
def test_run_whose_test_was_not_read(tmp_path, capsys, result, total, seconds):
    record = make_record(result=False) | {"result": result, "total_steps": total}
    report.main([write_run(tmp_path / "run", record)])
    assert cells(capsys.readouterr().out.splitlines()[2])[6:8] == ["-", seconds]


@pytest.mark.parametrize("again", ["run", "run/", "run/../run"])
def test_run_given_twice_is_one_line(tmp_path, capsys, again):
    run = write_run(tmp_path / "run", make_record())
    with pytest.raises(SystemExit) as raised:
        report.main([run, f"{tmp_path}/{again}"])
    assert raised.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/{again}: given twice; name each run once\n"
    )


@pytest.mark.parametrize("name", ["runs.jpg", "runs", "png", ".png", "runs.pdf"])
def test_figure_that_is_no_png_is_one_line(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", make_record())
    with pytest.raises(SystemExit) as raised:
        report.main([run, f"--figure={name}"])
    assert raised.value.code == 2
    output = capsys.readouterr()
    assert output.err == f"error: --figure={name}: expected a name that ends in .png\n"
    assert output.out == "" and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_figure_in_no_folder_is_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run", make_record())
    with pytest.raises(SystemExit) as raised:
        report.main([run, f"--figure={tmp_path}/missing/runs.png"])
    output = capsys.readouterr()
    assert raised.value.code == 2 and output.out == ""
    assert output.err.endswith(f"there is no folder {tmp_path}/missing\n")


def test_figure_that_cannot_be_written(tmp_path, capsys):
    run = write_run(tmp_path / "run", make_record())
    (tmp_path / ".runs.png.tmp").mkdir()
    with pytest.raises(SystemExit):
        report.main([run, f"--figure={tmp_path}/runs.png"])
    assert "runs.png: cannot be written" in capsys.readouterr().err


def test_figure_that_is_a_folder_is_told_before_the_table(tmp_path, capsys):
    run = write_run(tmp_path / "run", make_record())
    (tmp_path / "runs.png").mkdir()
    with pytest.raises(SystemExit) as raised:
        report.main([run, f"--figure={tmp_path}/runs.png"])
    output = capsys.readouterr()
    assert raised.value.code == 2 and output.out == ""
    assert output.err.endswith("runs.png: is a folder; name a file to write\n")


def test_metrics_without_times_have_no_curve_by_minutes(tmp_path, capsys):
    rows = [{name: x for name, x in row.items() if name != "train_seconds"} for row in ROWS]
    run = write_run(tmp_path / "run", make_record(), rows)
    report.main([run, f"--figure={tmp_path}/runs.png"])
    report.main([run, "--by=minutes"])  # of no figure
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        report.main([run, f"--figure={tmp_path}/minutes.png", "--by=minutes"])
    output = capsys.readouterr()
    assert raised.value.code == 2 and output.out == "" and not (tmp_path / "minutes.png").exists()
    assert output.err == "error: run: its metrics have no train_seconds; use --by=epochs\n"


def test_figure_of_a_run_without_evaluations_is_one_line(tmp_path, capsys):
    runs = [write_run(tmp_path / "run", make_record())]
    runs.append(write_run(tmp_path / "new", make_record(result=False), []))
    with pytest.raises(SystemExit) as raised:
        report.main([*runs, f"--figure={tmp_path}/runs.png"])
    output = capsys.readouterr()
    assert raised.value.code == 2 and output.out == ""
    assert output.err == "error: new: no evaluation in its metrics; leave it out of --figure\n"
    assert not (tmp_path / "runs.png").exists()


def test_a_lost_row_is_not_replaced_by_another(tmp_path, capsys):
    """The test was of step 20, whose row the file has lost."""
    run = write_run(tmp_path / "run", make_record(), ROWS[:2])
    report.main([run])
    found = cells(capsys.readouterr().out.splitlines()[2])
    assert found[3:8] == ["-", "-", "-", "0.4321", "unfinished"]
