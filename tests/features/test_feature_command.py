"""The command `cifar_jax.features`, and what it refuses."""

import json
import shutil

import pytest
from PIL import Image

from cifar_jax import config as configuration
from cifar_jax import features, main, predict, probe
from cifar_jax.checkpoint import FOLDER, read_checkpoint
from cifar_jax.errors import UserError
from cifar_jax.labels import CLASS_NAMES
from cifar_jax.recording.run_record import read_run_record
from configs import mlp
from tests.features.helpers import TOTAL, cached, flags_of, run_command
from tests.runs import ROOT


def test_the_command_ends_with_a_table_and_predictions_work(
    reference, module_config, small_data, no_backbone, tmp_path, capsys, monkeypatch
):
    flags = flags_of(module_config, reference)
    code, output, told = run_command(features, flags, capsys, monkeypatch)
    assert code == 0
    assert "; all up to stage4, its norms too, is frozen and computed once; behind it: " in told
    accuracy = read_run_record(reference)["result"]["test_accuracy"]
    assert f"{accuracy:.4f}" in output and "SAMPLE" in output and "curves.png" in output
    assert f"-m cifar_jax.predict --workdir={reference} PICTURE" in output
    Image.fromarray(small_data.train_images[0]).save(tmp_path / "picture.png")
    predict.main([str(tmp_path / "picture.png"), f"--workdir={reference}", "--json"])
    answer = json.loads(capsys.readouterr().out)[0]
    arrays, _ = read_checkpoint(reference / probe.HEAD_FOLDER, TOTAL)
    logits = cached(module_config)[0, 0, 0] @ arrays["params.head.logits.kernel"]
    logits += arrays["params.head.logits.bias"]
    assert answer["label"] == CLASS_NAMES[logits.argmax()]


def damage_the_cache(place, config):
    """A cache of its own, since the reference's is shared."""
    shutil.copytree(config.data.directory, place / "data")
    for path in (place / "data").glob("features/*/train.npy"):
        path.write_bytes(path.read_bytes()[:-100])


BAD = {
    "no weights": (["--config.model.pretrained=none"], "config.model.pretrained is"),
    "the MLP": (["--config.model.name=mlp"], "only a resnet50 uses this field"),
    "missing weights": (["--config.model.pretrained=no.pth"], "no.pth"),
    "another variant": (["--config.model.variant=keras"], "config.model.variant=torchvision"),
    "unknown head": (["--config.model.head=none"], "config.model.head"),
    "damaged features": (["--config.data.directory=data"], "train.npy is damaged"),
    "too large a batch": (["--config.batch_size=800"], "config.batch_size is 800"),
    "batch that devices cannot share": (["--config.eval_batch_size=20"], "8 devices"),
    "a workdir of main": (["--workdir=run"], "of cifar_jax.main"),
    "a workdir of others' checkpoints": (
        ["--workdir=odd"],
        "holds checkpoints, but not the run.json of a run",
    ),
    "a data folder that is a file": (["--config.data.directory=text.txt"], "text.txt"),
    "no flags": (None, "--config is missing; for example --config=configs/resnet50_probe.py"),
}


def test_an_mlp_has_no_features():
    with pytest.raises(
        UserError, match='config.model.name is "mlp"; features come from a backbone'
    ):
        configuration.check_features(configuration.to_dict(mlp.get_config()))


@pytest.mark.parametrize("command", [features, main])
def test_missing_weights_are_told_before_images_are_looked_for(
    command, module_config, tmp_path, capsys, monkeypatch
):
    for module in ("setup", "data.sources"):
        monkeypatch.setattr(f"cifar_jax.{module}.load", lambda *_: pytest.fail("images were read"))
    arguments = [*flags_of(module_config, tmp_path / "new"), "--config.model.pretrained=no.pth"]
    code, _, errors = run_command(command, arguments, capsys, monkeypatch)
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith("error: config.model.pretrained: no.pth: no such file of weights")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case, reference, module_config, small_data, tmp_path, capsys, monkeypatch, no_backbone
):
    arguments, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no folder")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"config": {}, "features": null}')
    (tmp_path / "odd" / FOLDER / "3").mkdir(parents=True)
    if case == "damaged features":
        damage_the_cache(tmp_path, module_config)
    arguments = [] if arguments is None else [*flags_of(module_config, "new"), *arguments]
    code, _, errors = run_command(features, arguments, capsys, monkeypatch)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    told = ("pretrained tensors from", "note: ", "features go to")
    rest = [x for x in errors.splitlines() if x not in lines and not any(t in x for t in told)]
    assert code == 2
    assert len(lines) == 1 and said in lines[0] and rest == [], errors


def test_main_refuses_a_workdir_of_features(reference, small_data, tmp_path, capsys, monkeypatch):
    before = (reference / "run.json").read_bytes()
    arguments = [f"--config={ROOT / 'configs' / 'mlp.py'}", f"--workdir={reference}"]
    arguments += ["--config.data.source=sample"]
    code, _, errors = run_command(main, arguments, capsys, monkeypatch)
    assert code == 2 and "holds a run of cifar_jax.features, of a head alone" in errors
    assert (reference / "run.json").read_bytes() == before
