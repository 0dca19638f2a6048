"""Weights whose numbers tell every tensor apart, in the networks of other frameworks."""

import os
import re
import zlib

import numpy as np
import pytest

WEIGHTS_VARIABLE = "CIFAR_JAX_WEIGHTS"


def random_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns float32 numbers that depend on the name, at a scale that keeps activations finite."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) > 1:
        fan_in = np.prod(shape) / max(shape[0], shape[-1])
        return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(1 / fan_in))
    if "var" in name:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return (rng.uniform(-0.2, 0.2, shape) + (0.7 if "scale" in name else 0)).astype(np.float32)


def real_weights() -> str:
    """Returns the path of a real torchvision-named file, or skips the test and says so."""
    path = os.environ.get(WEIGHTS_VARIABLE)
    if not path:
        pytest.skip(f"no real weights: {WEIGHTS_VARIABLE} is not set")
    return path


def our_path_of_keras(layer: str) -> str:
    """Translates a name of keras.applications, in the test's own words."""
    if layer == "predictions":
        return "top"
    kind = "norm" if layer.endswith("_bn") else "conv"
    if layer.startswith("conv1_"):
        return f"stem_{kind}"
    stage, block, position = map(int, re.findall(r"\d+", layer))
    place = f"{kind}{position}" if position else f"shortcut_{kind}"
    return f"stage{stage - 1}.block{block}.{place}"


def our_path_of_torch(module: str) -> str:
    """Translates a name of torchvision, in the test's own words."""
    fixed = {"conv1": "stem_conv", "bn1": "stem_norm", "fc": "top"}
    if module in fixed:
        return fixed[module]
    stage, block, *rest = module.removeprefix("layer").split(".")
    if rest[0] == "downsample":
        place = ("shortcut_conv", "shortcut_norm")[int(rest[1])]
    else:
        place = rest[0].replace("bn", "norm")
    return f"stage{stage}.block{int(block) + 1}.{place}"


def hugging_face_names(state: dict) -> dict:
    """Renames torchvision's to those of transformers' ResNetForImageClassification."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^conv1\.", "embedder.embedder.convolution.", name)
        name = re.sub(r"^bn1\.", "embedder.embedder.normalization.", name)
        name = re.sub(
            r"^layer(\d)\.(\d)\.",
            lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.",
            name,
        )
        name = name.replace("downsample.0", "shortcut.convolution")
        name = name.replace("downsample.1", "shortcut.normalization")
        name = re.sub(r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution.", name)
        name = re.sub(r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization.", name)
        renamed["resnet." + name if not name.startswith("fc") else name] = value
    return {re.sub(r"^fc\.", "classifier.1.", name): value for name, value in renamed.items()}


def torch_resnet50():
    """Returns PyTorch's ResNet-50 v1.5 with random numbers, statistics included."""
    import torch

    from tests.references.torch_resnet50 import ResNet50

    model = ResNet50().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim:
                name = name if "running" in name or "conv" in name else f"{name}_scale"
                tensor.copy_(torch.from_numpy(random_array(name, tuple(tensor.shape))))
    return model


def keras_resnet50(**arguments):
    """Returns keras.applications.ResNet50 with random numbers, statistics included."""
    import keras

    model = keras.applications.ResNet50(weights=None, **arguments)
    randomize_keras(model)
    return model


def randomize_keras(model) -> None:
    """Gives every variable of a Keras model its own numbers."""
    for layer in model.layers:
        if getattr(layer, "layers", None):
            randomize_keras(layer)
        else:
            names = {"gamma": "scale", "moving_variance": "var"}
            layer.set_weights(
                [
                    random_array(f"{layer.name}/{names.get(w.name, w.name)}", tuple(w.shape))
                    for w in layer.weights
                ]
            )


def notebook_head():
    """The layers behind the notebook's ResNet50."""
    from keras import layers

    return [
        layers.Flatten(),
        layers.BatchNormalization(),
        layers.Dense(128, activation="relu"),
        layers.Dropout(0.5),
        layers.BatchNormalization(),
        layers.Dense(64, activation="relu"),
        layers.Dropout(0.5),
        layers.BatchNormalization(),
        layers.Dense(10, activation="softmax"),
    ]
