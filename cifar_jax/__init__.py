"""Fine-tune a pretrained ResNet-50 on CIFAR-10 in JAX, as Keras computes it."""

__version__ = "0.1.0"
