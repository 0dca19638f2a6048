"""Our file into models, the names against the models' own, the command, and the caches."""

import dataclasses
import functools
import hashlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from cifar_jax import port_weights
from cifar_jax.errors import UserError
from cifar_jax.initial import find_weights, load_initial_weights
from cifar_jax.models.resnet50 import ResNet50
from cifar_jax.models.transfer import TransferClassifier
from cifar_jax.pretrained import fetch, load, names, ours, port, torch
from cifar_jax.pretrained.names import Head, Structure
from tests import port_sources

_FLATTEN = Head("flatten", features=4 * 2048, classes=10)
_POOLED = Head("pooled", features=2048, classes=10)
_HEADER = ours.Header("a.h5", "00", "11", "test", "torchvision", "torchvision", "unknown")


def _shapes(build) -> dict[str, jax.ShapeDtypeStruct]:
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(path): variable.get_value() for path, variable in flat}


@functools.cache
def _backbone(variant="torchvision", classes=None):
    return _shapes(lambda rngs: ResNet50(variant, num_classes=classes, rngs=rngs))


@functools.cache
def _transfer(variant="torchvision", head="flatten"):
    return _shapes(lambda rngs: TransferClassifier(variant, head=head, upsampling=2, rngs=rngs))


def _parts(paths) -> set[str]:
    return {path.removeprefix("backbone.").split(".")[0] for path in paths}


def _random(structure: Structure) -> dict[str, np.ndarray]:
    shapes = names.shapes(structure)
    return {name: port_sources.random_array(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ours with top, whole transfer, and backbone alone, by name; with what is in them."""
    folder = tmp_path_factory.mktemp("weights")
    structures = {
        "top": Structure("torchvision", classes=1000),
        "plain": Structure("torchvision"),
        "whole": Structure("torchvision", head=_FLATTEN),
    }
    found = {}
    for name, structure in structures.items():
        values = _random(structure)
        ours.write(folder / f"{name}.safetensors", values, _HEADER)
        found[name] = (folder / f"{name}.safetensors", values)
    return found


@pytest.mark.parametrize("variant", names.VARIANTS)
@pytest.mark.parametrize(
    ("structure", "build"),
    [
        ({"classes": None}, _backbone),
        ({"classes": 1000}, lambda variant: _backbone(variant, 1000)),
        ({"head": _FLATTEN}, _transfer),
        ({"head": _POOLED}, lambda variant: _transfer(variant, "pooled")),
    ],
)
def test_names_and_shapes_are_the_models_own(variant, structure, build):
    expected = {name: like.shape for name, like in build(variant).items()}
    assert names.shapes(Structure(variant, **structure)) == expected


def test_published_counts():
    """25,557,032 parameters (torchvision's page); 25,636,712 and 40,899,018 (Keras's summary)."""

    def count(structure: Structure) -> int:
        return sum(int(np.prod(shape)) for shape in names.shapes(structure).values())

    assert count(Structure("torchvision", classes=1000)) == 25_557_032 + 53_120
    assert count(Structure("keras", classes=1000)) == 25_636_712
    whole = Head("flatten", features=64 * 2048, classes=10)
    assert count(Structure("keras", head=whole)) == 40_899_018


@pytest.mark.parametrize(
    ("file", "expected", "unused", "fresh"),
    [
        ("top", lambda: _backbone(classes=1000), set(), set()),
        ("top", lambda: _backbone(), {"top"}, set()),
        ("top", lambda: _transfer(), {"top"}, {"head"}),
        ("plain", lambda: _transfer(head="pooled"), set(), {"head"}),
        ("whole", lambda: _transfer(), set(), set()),
        ("whole", lambda: _backbone(), {"head"}, set()),
    ],
)
def test_what_goes_into_which_model(files, file, expected, unused, fresh):
    path, values = files[file]
    expected = expected()
    loaded = load.load_pretrained(expected, path)
    assert loaded.values.keys() | set(loaded.fresh) == expected.keys()
    assert _parts(loaded.unused) == unused and _parts(loaded.fresh) == fresh
    for name, array in loaded.values.items():
        source = name if name in values else name.removeprefix("backbone.")
        source = source if source in values else f"backbone.{source}"
        np.testing.assert_array_equal(array, values[source], err_msg=name)


@pytest.mark.parametrize(("head", "is_taken"), [("pooled", True), ("flatten", False)])
def test_a_fine_tuned_top_is_a_pooled_head_or_said_to_be_left_out(head, is_taken, tmp_path):
    values = _random(Structure("torchvision", classes=10))
    path = tmp_path / "tuned.safetensors"
    ours.write(path, values, _HEADER)
    config = {"name": "resnet50", "variant": "torchvision", "preprocessing": "torchvision"}
    config |= {"upsampling": 2, "interpolation": "nearest", "head": head}
    told = []
    loaded = load_initial_weights(
        _transfer(head=head), config | {"pretrained": str(path)}, tell=told.append
    )
    assert ("not used: backbone.top.bias, backbone.top.kernel" in told[0]) != is_taken
    assert ("head.logits.kernel" in loaded.values) == is_taken
    if is_taken:
        np.testing.assert_array_equal(loaded.values["head.logits.kernel"], values["top.kernel"])
        np.testing.assert_array_equal(loaded.values["head.logits.bias"], values["top.bias"])


_TUNED = dataclasses.replace(_HEADER, upsampling=4, interpolation="bilinear")


@pytest.mark.parametrize(
    ("header", "settings", "note"),
    [
        (_TUNED, (4, "bilinear"), None),
        (_TUNED, (8, "bilinear"), "upsampling 8; the head of these weights was trained with "),
        (_TUNED, (4, "nearest"), "interpolation nearest; the head of "),
        (_TUNED, (8, "nearest"), "upsampling 8, interpolation nearest; the head of these weights "),
        (_HEADER, (8, "nearest"), None),  # which does not say
    ],
)
def test_settings_that_a_tuned_head_was_not_trained_with_are_noted(
    header, settings, note, tmp_path
):
    path = tmp_path / "tuned.safetensors"
    ours.write(path, _random(Structure("torchvision", classes=10)), header)
    config = {"name": "resnet50", "variant": "torchvision", "preprocessing": "torchvision"}
    config |= dict(zip(("upsampling", "interpolation"), settings, strict=True))
    for head in ("pooled", "flatten"):  # which starts anew
        told = []
        config["head"] = head
        expected = _transfer(head=head)
        load_initial_weights(expected, config | {"pretrained": str(path)}, tell=told.append)
        notes = told[1:]
        assert len(notes) == (note is not None and head == "pooled")
        assert all(line.startswith(f"note: config.model has {note}") for line in notes)


def test_a_head_of_another_kind_is_told_by_the_field_to_set(tmp_path):
    path = tmp_path / "whole.safetensors"
    header = dataclasses.replace(_HEADER, head="flatten", upsampling=2)
    ours.write(path, _random(Structure("torchvision", head=_FLATTEN)), header)
    config = {"variant": "torchvision", "head": "pooled", "pretrained": str(path)}
    expected = 'config.model.head is "pooled", but .* holds .* "flatten" head; set .*head=flatten$'
    with pytest.raises(UserError, match=expected):
        load_initial_weights(
            _transfer(head="pooled"),
            config | {"name": "resnet50", "batch_norm": "train"},
            tell=pytest.fail,
        )


@pytest.mark.parametrize(
    ("asked", "own", "note"),
    [
        ("torchvision", "torchvision", None),
        (
            "unit",
            "torchvision",
            'config.model.preprocessing is "unit"; these weights were trained ',
        ),
        ("torchvision", "unit", 'is "torchvision"; these weights were trained with "unit"'),
        ("unit", "unknown", "does not say which preprocessing it was trained with"),
    ],
)
def test_a_preprocessing_that_is_not_the_weights_own_is_noted(asked, own, note, tmp_path):
    path = tmp_path / "weights.safetensors"
    header = dataclasses.replace(_HEADER, preprocessing=own)
    ours.write(path, _random(Structure("torchvision")), header)
    config = {"name": "resnet50", "variant": "torchvision", "preprocessing": asked}
    config["head"] = "flatten"
    told = []
    load_initial_weights(_transfer(), config | {"pretrained": str(path)}, tell=told.append)
    notes = told[1:]
    assert len(notes) == (note is not None)
    assert all(line.startswith("note: ") and note in line for line in notes)


def test_a_network_of_random_weights_says_that_it_is_one():
    told = {"resnet50": [], "mlp": []}
    for name, lines in told.items():
        config = {"name": name, "variant": "keras", "pretrained": "none", "batch_norm": "train"}
        assert load_initial_weights({}, config, tell=lines.append) is None
    starts = 'all weights start at random: config.model.pretrained is "none"'
    assert told == {"resnet50": [starts], "mlp": []}


@pytest.mark.parametrize(
    ("pretrained", "variant"), [("keras", "torchvision"), ("torchvision", "keras")]
)
def test_the_other_variant_is_told_without_a_download(pretrained, variant, monkeypatch):
    monkeypatch.setattr("cifar_jax.initial.resolve", lambda _: pytest.fail("looked for the file"))
    with pytest.raises(UserError, match=f"set config.model.variant={pretrained}"):
        find_weights({"name": "resnet50", "pretrained": pretrained, "variant": variant})


def test_differences_without_end_are_counted(tmp_path):
    path = tmp_path / "many.safetensors"
    empty = {f"layer{number}": np.zeros(0, np.float32) for number in range(2000)}
    ours.write(path, empty, _HEADER)
    with pytest.raises(UserError) as caught:
        port.read(path)
    first, *lines = str(caught.value).splitlines()
    assert "differences from the expected ResNet-50" in first
    assert len(lines) == 1001 and lines[-1].strip().startswith("... and ")


@pytest.mark.parametrize(
    ("file", "expected", "message"),
    [
        ("plain", lambda: _backbone(classes=1000), r"2 differences(.|\n)*top.kernel: missing"),
        ("top", lambda: _backbone(classes=10), r"top.bias: shape \(1000,\), expected \(10,\)"),
        ("plain", lambda: _backbone("keras"), r"53 differences(.|\n)*stem_conv.bias: missing"),
        ("whole", lambda: _transfer(head="pooled"), r"head.norm1.scale: unexpected"),
    ],
)
def test_what_does_not_fit_is_listed(files, file, expected, message):
    with pytest.raises(UserError, match=message):
        load.load_pretrained(expected(), files[file][0])


def test_wider_models_get_the_same_numbers_and_narrower_ones_nothing(files):
    path, values = files["plain"]

    def like(dtype):
        return {n: jax.ShapeDtypeStruct(s.shape, dtype) for n, s in _backbone().items()}

    loaded = load.load_pretrained(like(np.float64), path).values
    assert {array.dtype for array in loaded.values()} == {np.dtype(np.float64)}
    name = "stage2.block1.conv2.kernel"
    np.testing.assert_array_equal(loaded[name], values[name].astype(np.float64))
    with pytest.raises(UserError, match="stem_conv.kernel: float32, the model has bfloat16"):
        load.load_pretrained(like(jax.numpy.bfloat16), path)


def test_same_content_gives_the_same_bytes_and_another_bit_is_noticed(files, tmp_path):
    path, values = files["plain"]
    content = path.read_bytes()
    ours.write(tmp_path / "b.safetensors", dict(reversed(values.items())), _HEADER)
    assert content == (tmp_path / "b.safetensors").read_bytes()
    at = len(content) - 4_000_001
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    (tmp_path / "b.safetensors").write_bytes(flipped)
    with pytest.raises(UserError, match="do not have the SHA-256 in its header"):
        port.read(tmp_path / "b.safetensors")


@pytest.fixture
def torchvision_file(files, tmp_path):
    """A published file by torchvision's names."""
    path, values = files["top"]
    table = torch.table(Structure("torchvision", classes=1000), "torchvision")
    tensors = {name: entry.store(values[entry.name]) for name, entry in table.items()}
    tensors["bn1.num_batches_tracked"] = np.array(7)
    safetensors.numpy.save_file(tensors, tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def _run(*arguments) -> None:
    port_weights.main([str(argument) for argument in arguments])


def test_command_there_and_back_with_certificates(torchvision_file, tmp_path, capsys):
    there, certificate = tmp_path / "ours.safetensors", tmp_path / "certificate.json"
    _run(torchvision_file, there, "--certificate", certificate)
    printed = capsys.readouterr().out
    digest = hashlib.sha256(torchvision_file.read_bytes()).hexdigest()
    for line in (
        r"source +source.safetensors \(torchvision / timm\)",
        f"sha256 +{digest}",
        r"preprocessing +torchvision",
        r"read +268 entries",
        r"loaded +267 tensors, 25,610,152 numbers",
        r"ignored +1 entries\n +bnN.num_batches_tracked \(1\)",
        r"stage4 +1x3x4x2048( +-?\d\.\d{4}e[+-]\d\d){3}",
        r"logits +1x1000 ",
    ):
        assert re.search(line, printed), (line, printed)
    data = json.loads(certificate.read_text())
    assert data["sha256"] == digest and data["ignored"] == ["bn1.num_batches_tracked"]
    assert data["written"]["sha256"] == hashlib.sha256(there.read_bytes()).hexdigest()

    _run(there, tmp_path / "back.safetensors", "--to", "torchvision")
    before, after = map(
        safetensors.numpy.load_file, (torchvision_file, tmp_path / "back.safetensors")
    )
    assert before.keys() - after.keys() == {"bn1.num_batches_tracked"}
    for name, array in after.items():
        np.testing.assert_array_equal(array, before[name], strict=True)


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(monkeypatch):
    """No shell expands it there; a folder called ~ would be a trap for whoever removes it."""
    monkeypatch.setenv("HOME", "/home/me")
    flags = port_weights._parse(["a.pth", "~/a.safetensors", "--certificate=~/a.json"])
    assert flags.dest == Path("/home/me/a.safetensors")
    assert flags.certificate == Path("/home/me/a.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("SOURCE", "a.safetensors", "--variant", "keras"), "of variant torchvision, asked for is"),
        (("SOURCE", "a.npz"), "a.npz: expected a name that ends in .safetensors"),
        (("SOURCE", "a.weights.h5", "--to", "keras"), "only --to torchvision is possible"),
        (("SOURCE", "a.pth", "--to", "torchvision"), "ends in .safetensors"),
        (("SOURCE", "SOURCE"), "is the source itself"),
        (("SOURCE", "a.safetensors", "--certificate", "SOURCE"), "is the source itself"),
        (("SOURCE", "a.safetensors", "--certificate", "a.safetensors"), "a file of its own"),
        (("OURS", "a.safetensors"), "ported already; to write it back, add --to torchvision"),
        (("WHOLE", "a.safetensors", "--to", "torchvision"), "no names for a transfer model's head"),
        (("absent.h5", "a.safetensors"), "absent.h5: no such file of weights"),
    ],
)
def test_command_refuses_in_one_line(
    files, torchvision_file, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    paths = {"SOURCE": torchvision_file, "OURS": files["top"][0], "WHOLE": files["whole"][0]}
    with pytest.raises(SystemExit) as caught:
        _run(*(paths.get(argument, argument) for argument in arguments))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error
    assert {path.name for path in tmp_path.iterdir()} == {"source.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.npz",), "a.npz: expected a name that ends in .safetensors"),
        (("a.safetensors", "--to", "keras"), "expected a name that ends in .weights.h5"),
        (("a.safetensors", "--to", "torchvision"), "only --to keras is possible"),
        (("a.weights.h5", "--to", "keras", "--upsampling", "2"), "--to has no place for it"),
    ],
)
def test_command_refuses_what_no_source_makes_right_before_it_is_fetched(
    monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(fetch, "resolve", lambda _: pytest.fail("fetched"))
    with pytest.raises(SystemExit):
        _run("keras", *arguments)
    assert message in capsys.readouterr().err


def test_a_folder_of_weights_is_told_to_be_ported_first(tmp_path):
    config = {"name": "resnet50", "variant": "keras", "pretrained": str(tmp_path)}
    with pytest.raises(UserError) as caught:
        find_weights(config)
    assert str(caught.value) == (
        f"config.model.pretrained: {tmp_path}: is a folder; port a run first: "
        "python -m cifar_jax.port_weights RUN NEW.safetensors"
    )


_NOTOP = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches, and published hashes of files that say `content`."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for file, published in fetch.PUBLISHED.items():
        digest = hashlib.new(published.algorithm, b"content").hexdigest()
        digest = digest[: len(published.digest)]
        changed = fetch.dataclasses.replace(published, digest=digest, address="http://127.0.0.1:1/")
        monkeypatch.setitem(fetch.PUBLISHED, file, changed)
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "place"),
    [
        ("keras", f"keras/models/{_NOTOP}"),
        ("keras", f"keras/models/{_NOTOP.replace('_notop', '')}"),
        ("keras", f"mine/{_NOTOP}"),
        ("torchvision", "torch/hub/checkpoints/resnet50-0676ba61.pth"),
        ("torchvision", "mine/resnet50-0676ba61.pth"),
    ],
)
def test_files_that_are_there_are_used_and_checked(caches, wanted, place, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "*")
    (caches / place).parent.mkdir(parents=True)
    (caches / place).write_bytes(b"content")
    assert fetch.resolve(wanted, caches / "mine") == caches / place
    assert capsys.readouterr().err == ""
    (caches / place).write_bytes(b"other content")
    differs = r"its (md5|sha256) is \w+, published is \w+.* delete it and fetch it again"
    is_ours = place.startswith("mine")
    with pytest.raises(UserError, match=differs if is_ours else "download of .* failed"):
        fetch.resolve(wanted, caches / "mine")
    # What another program keeps is passed over, aloud.
    told = re.escape(f"note: passed over: {caches / place}: ") + differs
    assert bool(re.search(told, capsys.readouterr().err)) != is_ours


def test_a_damaged_file_of_a_framework_does_not_hide_our_own(caches):
    for folder, content in (("keras/models", b"damaged"), ("mine", b"content")):
        (caches / folder).mkdir(parents=True)
        (caches / folder / _NOTOP).write_bytes(content)
    assert fetch.resolve("keras", caches / "mine") == caches / "mine" / _NOTOP


@pytest.mark.parametrize(("wanted", "file"), [("keras", _NOTOP), ("torchvision", "resnet50-0676")])
def test_without_network_it_says_which_file_to_put_where(caches, monkeypatch, wanted, file):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserError) as caught:
        fetch.resolve(wanted, caches / "mine")
    assert re.search(f"put {file}.* into {caches / 'mine'} or give its path", str(caught.value))
    assert "\n" not in str(caught.value)


def test_published_file_under_its_name_is_checked_before_it_is_read(torchvision_file):
    path = torchvision_file.rename(torchvision_file.with_name("resnet50-0676ba61.pth"))
    with pytest.raises(UserError, match="its sha256 is .* published is 0676ba61"):
        port.read(path)


def test_published_hashes_are_those_of_the_frameworks():
    from keras.src.applications import resnet

    found = [p.digest for file, p in fetch.PUBLISHED.items() if file.endswith(".h5")]
    assert found[::-1] == list(resnet.WEIGHTS_HASHES["resnet50"])
    assert all(
        p.address == resnet.BASE_WEIGHTS_PATH for f, p in fetch.PUBLISHED.items() if "h5" in f
    )
    for file, published in fetch.PUBLISHED.items():
        if file.endswith(".pth"):  # torchvision's names carry the hash
            assert file == f"resnet50-{published.digest}.pth"
