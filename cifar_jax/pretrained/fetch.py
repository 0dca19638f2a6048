"""Published weights by name: where they may lie, their addresses, hashes and licences."""

import dataclasses
import hashlib
import os
from pathlib import Path

from cifar_jax.download import download
from cifar_jax.errors import UserError, tell

CACHE = "~/.cache/cifar_jax/weights"
PORT_A_RUN = "port a run first: python -m cifar_jax.port_weights RUN NEW.safetensors"  # advice
_TIMEOUT = 20.0  # seconds
_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications/resnet/"
_TORCHVISION = "https://download.pytorch.org/models/"


@dataclasses.dataclass(frozen=True)
class Published:
    """One file that its makers publish."""

    file: str
    address: str  # of the folder
    algorithm: str
    digest: str  # hexadecimal; torchvision publishes the first digits
    license: str

    def check(self, path: str | os.PathLike) -> None:
        """Raises `UserError` where `path` does not have the published hash."""
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, self.algorithm).hexdigest()
        if not found.startswith(self.digest):
            raise UserError(
                f"{path}: its {self.algorithm} is {found[: len(self.digest)]}, published is "
                f"{self.digest}: another file under this name, or damaged; delete it and fetch it "
                "again"
            )


_STEM = "resnet50_weights_tf_dim_ordering_tf_kernels"
PUBLISHED = {
    published.file: published
    for published in (
        Published(f"{_STEM}_notop.h5", _KERAS, "md5", "4d473c1dd8becc155b73f8504c6f6626", "MIT"),
        Published(f"{_STEM}.h5", _KERAS, "md5", "2cb95161c43110f7111970584f804107", "MIT"),
        Published("resnet50-0676ba61.pth", _TORCHVISION, "sha256", "0676ba61", "BSD-3-Clause"),
        Published("resnet50-11ad3fa6.pth", _TORCHVISION, "sha256", "11ad3fa6", "BSD-3-Clause"),
    )
}
_WANTED = {  # the first one is downloaded; any will do
    "keras": (f"{_STEM}_notop.h5", f"{_STEM}.h5"),
    "torchvision": ("resnet50-0676ba61.pth",),
}
NAMES = tuple(_WANTED)


def resolve(pretrained: str, cache: str | os.PathLike = CACHE) -> Path:
    """Returns the local file that `--config.model.pretrained` means, downloaded if need be.

    Args:
        pretrained: "keras", "torchvision", or the path of a file.
        cache: folder for downloads.

    Raises:
        UserError: where the file is missing and cannot be had, or has not the published hash.
    """
    if pretrained not in _WANTED:
        path = Path(pretrained).expanduser()
        if path.is_dir():
            raise UserError(f"{pretrained}: is a folder; {PORT_A_RUN}")
        if not path.is_file():
            raise UserError(
                f"{pretrained}: no such file of weights; expected a path, keras or torchvision"
            )
        return path
    cache = Path(cache).expanduser()
    for file in _WANTED[pretrained]:
        if (cache / file).is_file():
            PUBLISHED[file].check(cache / file)
            return cache / file
        if _is_sound(PUBLISHED[file], _framework_cache(pretrained) / file):
            return _framework_cache(pretrained) / file
    return _download(PUBLISHED[_WANTED[pretrained][0]], cache)


def check_published(path: str | os.PathLike) -> Published | None:
    """Checks a file that bears a published name against the published hash.

    Returns:
        What is published under that name; None where nothing is.

    Raises:
        UserError: where the hash differs.
    """
    published = PUBLISHED.get(Path(path).name)
    if published:
        published.check(path)
    return published


def _is_sound(published: Published, path: Path) -> bool:
    """Returns whether a framework's cache holds the file; a damaged one is the framework's own."""
    try:
        if not path.is_file():
            return False
        published.check(path)
    except (UserError, OSError) as error:
        tell(f"note: passed over: {error}")
        return False
    return True


def _download(published: Published, cache: Path) -> Path:
    try:
        return download(
            published.address + published.file,
            cache / published.file,
            description=f"ImageNet weights {published.file}",
            timeout=_TIMEOUT,
            check=published.check,
        )
    except UserError as error:
        raise UserError(
            f"{error}; without network, put {published.file} into {cache} or give its path instead"
        ) from error


def _framework_cache(pretrained: str) -> Path:
    if pretrained == "keras":
        return Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "models"
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(home).expanduser() / "hub" / "checkpoints"
