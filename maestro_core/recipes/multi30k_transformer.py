"""The base transformer, German to English, on Multi30k: hours on a GPU, days on a CPU.

Size, optimiser, smoothing and dropout are those of the Maestro paper's run (ICML 2024) as far as
they are known; its number of epochs, 400, is not: the rate falls to 0 in fewer.
"""

from maestro_core.models.transformer import Transformer
from maestro_core.recipes.recipe import TextRecipe
from maestro_core.schedule import HyperParameters, Moments, Phase
from maestro_core.search import SearchParameters

VOCABULARY = 9_521  # Pufferfish's (Wang et al., MLSys 2021), by its parameter counts

RECIPE = TextRecipe(
    name="multi30k-transformer",
    summary="a transformer from German to English, for a GPU; --data FOLDER with train.de.gz, ...",
    network=lambda: Transformer(VOCABULARY),
    data_set="Multi30k",
    source="Elliott et al., 2016",
    languages=("de", "en"),
    splits=("train", "val", "test_2016_flickr"),
    vocabulary=VOCABULARY,
    training=HyperParameters(
        phases=(Phase("dense", 15, 5e-4), Phase("ordered", 5, 2e-4), Phase("nested", 20, 3e-4)),
        batch_size=128,
        momentum=0.0,
        adam=Moments(betas=(0.9, 0.98), epsilon=1e-9),
        weight_decay=0.0,
        warmup=0.1,
        label_smoothing=0.1,
        lasso=0.0,
        threshold=1e-5,
        whitened=True,
        seed=0,
    ),
    search=SearchParameters(points=12, least_macs=0.1, probes=6, samples=100),
)
