"""The notebook's transfer model in Keras, and some steps of its training."""

import numpy as np

from tests.references import weights

# Our names of the preprocessings that keras.applications knows to its own.
PREPROCESSING_MODES = {"keras": "caffe", "torchvision": "torch"}


def create(*, upsampling: int, preprocessing: str, dropout: float = 0):
    """The model, ending in logits; its layers carry our names."""
    import keras
    from keras import layers

    def preprocess(x):
        if preprocessing == "unit":
            return x / 255
        mode = PREPROCESSING_MODES[preprocessing]
        return keras.applications.imagenet_utils.preprocess_input(x, mode=mode)

    images = keras.Input((32, 32, 3))
    x = layers.UpSampling2D(upsampling, interpolation="nearest")(images)
    x = layers.Lambda(preprocess)(x)
    size = 32 * upsampling
    backbone = keras.applications.ResNet50(
        weights=None, include_top=False, input_shape=(size, size, 3)
    )
    x = layers.Flatten()(backbone(x))
    x = layers.BatchNormalization(name="norm1")(x)
    x = layers.Dense(128, "relu", name="dense1")(x)
    x = layers.Dropout(dropout)(x)
    x = layers.BatchNormalization(name="norm2")(x)
    x = layers.Dense(64, "relu", name="dense2")(x)
    x = layers.Dropout(dropout)(x)
    x = layers.BatchNormalization(name="norm3")(x)
    return keras.Model(images, layers.Dense(10, name="logits")(x))


def train(
    flat: weights.Flat,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    steps: int,
    learning_rate: float,
    **options,
) -> tuple[list[float], weights.Flat, weights.Flat]:
    """RMSprop from the given values: the losses, the first gradients, all variables afterwards."""
    import keras
    import tensorflow as tf

    model = create(**options)
    weights.to_keras(flat, model)
    trained = model.trainable_weights
    optimizer = keras.optimizers.RMSprop(learning_rate)
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    x = tf.constant(images, keras.config.floatx())
    losses, first = [], None
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = loss_function(labels, model(x, training=True))
        gradients = tape.gradient(loss, [w.value for w in trained])
        optimizer.apply(gradients, trained)
        losses.append(float(loss))
        first = first or [g.numpy() for g in gradients]
    by_name = weights.keras_weights(model)
    names = {id(w): name for name, w in by_name.items()}
    first = {names[id(w)]: g for w, g in zip(trained, first, strict=True)}
    params = {p: v for p, v in flat.items() if not p.endswith((".mean", ".var"))}
    return losses, weights.from_keras(first, params), weights.from_keras(by_name, flat)
