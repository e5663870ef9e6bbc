"""LeNet on MNIST: a few minutes on two cores."""

from maestro_core.artifact import Image
from maestro_core.models.lenet import LeNet
from maestro_core.recipes.recipe import Recipe
from maestro_core.schedule import HyperParameters, Phase
from maestro_core.search import SearchParameters

RECIPE = Recipe(
    name="mnist-lenet",
    summary="LeNet on handwritten digits, a few minutes on two cores; --data mnist.npz",
    network=LeNet,
    data_set="MNIST",
    source="LeCun et al., CC BY-SA 3.0",
    image=Image("L", 28, 28, mean=(0.1307,), std=(0.3081,)),
    labels=tuple("0123456789"),
    validation=5_000,
    kept_samples=0,  # the artifact ships with the project, and no data set does
    training=HyperParameters(
        phases=(Phase("ordered", 8, 0.02), Phase("nested", 16, 0.02)),
        batch_size=64,
        momentum=0.9,
        weight_decay=1e-4,
        lasso=0.0,
        threshold=1e-5,
        seed=0,
    ),
    search=SearchParameters(points=10, least_macs=0.15, probes=24),
)
