"""What all recipes on CIFAR-10 have alike."""

from maestro_core.artifact import Image
from maestro_core.data import Augmentation

DATA_SET = "CIFAR-10"
SOURCE = "Krizhevsky, 2009"
IMAGE = Image("RGB", 32, 32, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
AUGMENTATION = Augmentation(shift=4, flip=True)
LABELS = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
