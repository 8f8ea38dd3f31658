"""Built-in nets and data sets in a few words, for the help of commands.

They stand here and not beside the nets, so that ``--help`` need not import NumPy; a test compares the names.
"""

from __future__ import annotations

NETS = {
    "mlp": "two hidden layers of 100, for vectors or small images",
    "convnet": "three small convolutions, for images from 8x8 to 32x32",
    "resnet8": "of MLPerf Tiny, 32x32 RGB, 79 thousand numbers; pretrained on CIFAR-10",
    "mcunet": "MCUNet-5fps for microcontrollers, 128x128 RGB, 0.6 million numbers; pretrained on ImageNet",
    "mobilenetv2": "224x224 RGB, 3.5 million numbers; pretrained on ImageNet",
    "mobilenetv3-small": "224x224 RGB, 2.5 million numbers",
    "resnet18": "224x224 RGB, 12 million numbers",
    "resnet34": "224x224 RGB, 22 million numbers",
    "resnet50": "224x224 RGB, 26 million numbers",
    "deit-tiny": "a vision transformer, 224x224 RGB, 6 million numbers",
    "deit-small": "a vision transformer, 224x224 RGB, 22 million numbers",
    "alexnet-cl": "the small AlexNet of papers on continual learning, 32x32 RGB",
}
DATA = {
    "digits": "handwritten digits, 8x8 grey, 10 classes; comes with the package",
    "mnist": "handwritten digits, 28x28 grey, 10 classes",
    "notmnist": "letters A to J in many fonts, 28x28 grey, 10 classes",
    "cifar10": "32x32 RGB, 10 classes",
    "cifar100": "32x32 RGB, 100 classes",
    "cifar100_coarse": "CIFAR-100 with its 20 superclasses",
    "split100": "100 classes of Tiny-ImageNet at 32x32 RGB",
    "eurosat": "satellite pictures, 64x64 RGB, 10 classes",
    "flowers102": "flowers, 128x128 RGB, 88 or 102 classes",
}
"""Those besides digits are looked for in the folder that LANCE_REF_DATA names, and downloaded otherwise."""
