"""A small residual network on CIFAR-10, for hours on two cores.

It answers for a picture and its mirror image together: half as large a network trains for twice as
many epochs in that time.
"""

from dataclasses import replace

from maestro_core.models.mirrored import Mirrored
from maestro_core.models.resnet9 import ResNet9, prepare_
from maestro_core.recipes import cifar10
from maestro_core.recipes.recipe import Recipe
from maestro_core.schedule import HyperParameters, Phase
from maestro_core.search import SearchParameters

RECIPE = Recipe(
    name="cifar10-small",
    summary="ResNet-9 on CIFAR-10, hours on two cores; --data cifar10.npz",
    network=lambda: Mirrored(ResNet9()),
    data_set=cifar10.DATA_SET,
    source=cifar10.SOURCE,
    image=cifar10.IMAGE,
    labels=cifar10.LABELS,
    validation=2_500,
    kept_samples=1_000,
    augmentation=replace(cifar10.AUGMENTATION, cutout=8),
    prepare=prepare_,
    training=HyperParameters(
        phases=(
            Phase("dense", 21, 0.25),
            Phase("dense", 33, 0.2, distortion=0.2),
            Phase("ordered", 1, 0.02),
            Phase("nested", 10, 0.06, taught=True, group=1),
            Phase("nested", 9, 0.04, group=1),
            Phase("nested", 9, 0.06, group=1),
            Phase("nested", 9, 0.04, group=1),
            Phase("nested", 5, 0.04, group=2),
            Phase("nested", 5, 0.04, group=2),
        ),
        batch_size=256,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-3,
        warmup=0.15,
        whitened=True,
        normalisation_rate=64.0,
        keep=("network.whitening",),
        label_smoothing=0.2,
        lasso=0.0,
        threshold=1e-5,
        precision="bfloat16",
        seed=0,
    ),
    search=SearchParameters(
        points=40,
        least_macs=0.05,
        most_macs=0.4,
        probes=8,
        samples=500,
        multiple=16,
        removable=("network.body.*.residual.*",),
    ),
)
