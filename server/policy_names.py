"""The names of policies, for settings and for help: nothing else is loaded with them."""

from typing import Final, Literal

OURS: Final = "maestro"
RESERVE: Final = "reserve"
# To compare with ours; of benchmarks/simulator.
RivalName = Literal[
    "largest",
    "middle",
    "smallest",
    "infaas",
    "maxacc",
    "maxbatch",
    "slackfit",
    "clipper",
    "bentoml",
    "clockwork",
    "nexus",
    "nexus-smallest",
]
PolicyName = Literal["maestro", "reserve", RivalName]
