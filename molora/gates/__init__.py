"""Gates: router logits -> routing weights. Selection and normalisation live here alone."""

from .base import GATES, Gate, register_gate
from .biased_sigmoid import BiasedSigmoid
from .convex import Convex
from .decoupled import Decoupled
from .dense import Dense
from .gshard import GShard
from .indicator import Indicator
from .intuition import Intuition
from .learned_threshold import LearnedThreshold
from .null_experts import NullExperts
from .pruned_top_k import PrunedTopK
from .sigmoid import Sigmoid
from .sparsegen import Sparsegen
from .switch import Switch
from .threshold import Threshold
from .top_k import TopK
from .top_k_unnormalized import TopKUnnormalized
from .top_p import TopP
from .uniform import Uniform

__all__ = [
    "GATES",
    "BiasedSigmoid",
    "Convex",
    "Decoupled",
    "Dense",
    "GShard",
    "Gate",
    "Indicator",
    "Intuition",
    "LearnedThreshold",
    "NullExperts",
    "PrunedTopK",
    "Sigmoid",
    "Sparsegen",
    "Switch",
    "Threshold",
    "TopK",
    "TopKUnnormalized",
    "TopP",
    "Uniform",
    "register_gate",
]
