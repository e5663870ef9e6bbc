"""ResNet-50 on ImageNet, all its layers factorised, as in the Maestro paper (ICML 2024)."""

from maestro_core.models.resnet import ResNet50
from maestro_core.recipes import imagenet
from maestro_core.recipes.recipe import Recipe

RECIPE = Recipe(
    name="imagenet-resnet50",
    summary="ResNet-50 on ImageNet as in the paper, 90 epochs, for a GPU; "
    "--data FOLDER with train/CLASS/ and val/CLASS/",
    network=ResNet50,
    data_set=imagenet.DATA_SET,
    source=imagenet.SOURCE,
    image=imagenet.IMAGE,
    labels=(),  # the names of the class folders
    folders=imagenet.FOLDERS,
    validation=imagenet.VALIDATION,
    kept_samples=imagenet.KEPT_SAMPLES,
    training=imagenet.training(params=0.36),  # 9.2 M
    search=imagenet.search(points=16),
)
