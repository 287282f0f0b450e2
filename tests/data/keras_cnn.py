"""Makes keras_cnn_*.onnx and keras_cnn.npz: a small Keras classifier by tf2onnx, and TensorFlow's gradients.

    pip install tensorflow-cpu==2.21.0 tf2onnx==1.17.0
    python tests/data/keras_cnn.py

The network has what MobileNets of Keras have: batch normalisation, ReLU6, SAME padding at stride 2, depthwise
convolutions, squeeze and excite, pooling, softmax. Weights are random; height and width are open.
"""

import os
from pathlib import Path

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0", CUDA_VISIBLE_DEVICES="")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

HERE = Path(__file__).parent
OPSETS = (9, 13, 18)
SIZES = ((19, 26), (32, 24))
CLASSES = ((0, 3), (4, 1))


def network() -> tuple[keras.Model, keras.Model]:
    """Return the classifier, and the same up to its logits with the last activation as an output, too."""
    keras.utils.set_random_seed(0)
    image = x = layers.Input((None, None, 3), name="image")
    x = layers.Conv2D(8, 3, 2, "same", use_bias=False)(x)
    x = layers.ReLU(6)(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, 2, "same", use_bias=False)(x)
    x = layers.ReLU(6)(layers.BatchNormalization()(x))
    gate = layers.Conv2D(4, 1, activation="relu")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    x = layers.Multiply()([x, layers.Conv2D(8, 1, activation="sigmoid")(gate)])
    x = layers.Conv2D(12, 1, activation="swish")(x)
    x = layers.Add()([layers.MaxPooling2D(3, 1, "same")(x), layers.AveragePooling2D(3, 1, "same")(x)])
    last = x = layers.Conv2D(16, 3, padding="same", activation=lambda v: tf.nn.relu6(v))(x)
    logits = layers.Dense(5)(layers.GlobalAveragePooling2D()(x))
    inner = keras.Model(image, [last, logits])
    for weight in inner.weights:
        scale = {"gamma": (0.5, 1.5), "beta": (0.5, 1.0), "moving_mean": (-0.1, 0.1)}
        low, high = scale.get(weight.name, (0.5, 1.5) if weight.name == "moving_variance" else (None, None))
        if low is not None:
            weight.assign(np.random.uniform(low, high, weight.shape))
    return keras.Model(image, layers.Softmax()(logits)), inner


def gradients(inner: keras.Model, x: np.ndarray) -> dict[str, np.ndarray]:
    """Return the last activation, and the gradients of the logits of CLASSES there and at the image."""
    at_image, at_last = [], []
    for n, row in enumerate(CLASSES):
        for index in row:
            image = tf.constant(x)
            with tf.GradientTape() as tape:
                tape.watch(image)
                last, logits = inner(image, training=False)
                score = logits[n, index]
            found = tape.gradient(score, [image, last])
            at_image.append(found[0].numpy()[n])
            at_last.append(found[1].numpy()[n])
    return {"last": last.numpy(), "at_image": np.stack(at_image), "at_last": np.stack(at_last)}


def main() -> None:
    classifier, inner = network()
    values = {}
    for i, size in enumerate(SIZES):
        x = np.random.default_rng(i).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
        found = {"x": x, "scores": classifier(x, training=False).numpy(), **gradients(inner, x)}
        values.update({f"{name}_{i}": value for name, value in found.items()})
    np.savez_compressed(HERE / "keras_cnn.npz", **values)
    for opset in OPSETS:
        classifier.export(
            str(HERE / f"keras_cnn_{opset}.onnx"), format="onnx", opset_version=opset, verbose=False
        )


if __name__ == "__main__":
    main()
