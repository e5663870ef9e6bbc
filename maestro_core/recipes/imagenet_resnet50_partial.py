"""ResNet-50 on ImageNet, the ten convolutions of its last stage factorised.

As the Maestro paper (ICML 2024) does to compare with Pufferfish (MLSys 2021).
"""

from maestro_core.models.resnet import ResNet50
from maestro_core.recipes import imagenet
from maestro_core.recipes.recipe import Recipe

RECIPE = Recipe(
    name="imagenet-resnet50-partial",
    summary="the same network, its last stage alone in factors, 90 epochs, for a GPU; "
    "--data FOLDER with train/CLASS/ and val/CLASS/",
    network=ResNet50,
    data_set=imagenet.DATA_SET,
    source=imagenet.SOURCE,
    image=imagenet.IMAGE,
    labels=(),  # the names of the class folders
    folders=imagenet.FOLDERS,
    validation=imagenet.VALIDATION,
    kept_samples=imagenet.KEPT_SAMPLES,
    training=imagenet.training(params=0.595, keep=("stem", "stages.[012].*", "head")),  # 15.2 M
    search=imagenet.search(points=8),
)
