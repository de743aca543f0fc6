"""Gates: router logits -> routing weights. Selection and normalisation live here alone."""

from .base import GATES, Gate, register_gate
from .dense import Dense
from .sigmoid import Sigmoid
from .switch import Switch
from .threshold import Threshold
from .top_k import TopK
from .top_k_unnormalized import TopKUnnormalized
from .top_p import TopP

__all__ = [
    "GATES",
    "Dense",
    "Gate",
    "Sigmoid",
    "Switch",
    "Threshold",
    "TopK",
    "TopKUnnormalized",
    "TopP",
    "register_gate",
]
