"""ResNet-18 on CIFAR-10 as in the Maestro paper (ICML 2024): days on a CPU, hours on a GPU."""

from maestro_core.models.resnet import ResNet18
from maestro_core.recipes import cifar10
from maestro_core.recipes.recipe import Recipe
from maestro_core.schedule import HyperParameters, Phase
from maestro_core.search import SearchParameters

RECIPE = Recipe(
    name="cifar10-resnet18",
    summary="ResNet-18 on CIFAR-10 as in the paper, 300 epochs, for a GPU; --data cifar10.npz",
    network=ResNet18,
    data_set=cifar10.DATA_SET,
    source=cifar10.SOURCE,
    image=cifar10.IMAGE,
    labels=cifar10.LABELS,
    validation=5_000,
    kept_samples=1_000,
    augmentation=cifar10.AUGMENTATION,
    training=HyperParameters(
        phases=(Phase("ordered", 300, 0.01, milestones=(0.5, 0.75)),),
        batch_size=128,
        momentum=0.9,
        weight_decay=1e-4,
        lasso=16e-6,
        threshold=1e-5,
        seed=0,
    ),
    search=SearchParameters(points=16, least_macs=0.05, probes=16, samples=2_048),
)
