"""Hidden states to a pessimistic reward in one op. README.md has maths, arguments and limits."""

from .contract import EnsembleOutput
from .op import STD_FLOOR, ensemble_reward
from .reference import aggregate, nominal_reward, philox_normal
from .spec import Aggregation
from .trust import TRUST_DIRECTIONS, TrustRegion

__all__ = [
    "STD_FLOOR",
    "TRUST_DIRECTIONS",
    "Aggregation",
    "EnsembleOutput",
    "TrustRegion",
    "aggregate",
    "ensemble_reward",
    "nominal_reward",
    "philox_normal",
]
