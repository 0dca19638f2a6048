"""Fine-tune a pretrained ResNet-50 on CIFAR-10 in JAX, equal to Keras and faster."""

__version__ = "0.1.0"
