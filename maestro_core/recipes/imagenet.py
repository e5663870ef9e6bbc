"""What all recipes on ImageNet have alike: pictures, schedule and search.

The schedule is that of the Maestro paper's code (ICML 2024), but that weight decay is on biases and
normalisation too. The paper chooses the weight of the group lasso so that the network comes to
Pufferfish's size (MLSys 2021); here a target does (target.py), and `--target-params` sets another.
"""

from maestro_core.artifact import Image
from maestro_core.folders import Folders
from maestro_core.schedule import HyperParameters, Phase
from maestro_core.search import SearchParameters
from maestro_core.target import Target

DATA_SET = "ImageNet-1k"
SOURCE = "Russakovsky et al., 2015"
IMAGE = Image("RGB", 224, 224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), shorter=256)
FOLDERS = Folders(classes=1_000)
VALIDATION = 10_000
KEPT_SAMPLES = 0  # the pictures may not be passed on


def training(params: float, keep: tuple[str, ...] = ()) -> HyperParameters:
    """Return 90 epochs that end at this share of the dense parameters, with `keep` left dense."""
    return HyperParameters(
        phases=(Phase("ordered", 90, 0.1, milestones=(30 / 90, 60 / 90, 80 / 90)),),
        batch_size=256,
        momentum=0.9,
        weight_decay=1e-4,
        lasso=0.0,
        threshold=1e-5,
        precision="bfloat16",
        seed=0,
        keep=keep,
        target=Target("params", params),
    )


def search(points: int) -> SearchParameters:
    """Return a search for so many points."""
    return SearchParameters(points=points, least_macs=0.05, probes=16, samples=2_048)
