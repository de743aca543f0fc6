"""Gates: router logits -> routing weights. Selection and normalisation live here alone."""

from .base import GATES, Gate, register_gate
from .biased_sigmoid import BiasedSigmoid
from .dense import Dense
from .indicator import Indicator
from .pruned_top_k import PrunedTopK
from .sigmoid import Sigmoid
from .switch import Switch
from .threshold import Threshold
from .top_k import TopK
from .top_k_unnormalized import TopKUnnormalized
from .top_p import TopP

__all__ = [
    "GATES",
    "BiasedSigmoid",
    "Dense",
    "Gate",
    "Indicator",
    "PrunedTopK",
    "Sigmoid",
    "Switch",
    "Threshold",
    "TopK",
    "TopKUnnormalized",
    "TopP",
    "register_gate",
]
