"""Saved LoRA adapters as the experts of one mixture: how, and by what their weights are chosen."""

from .arrow import Arrow
from .base import COMPOSERS, Composer, register_composer
from .compose import compose
from .dume import Dume, fit_ridge
from .linear import Linear
from .phatgoose import Phatgoose, fit_gates
from .plan import Composition, plan_composition
from .static import Static, fit_weights

__all__ = [
    "COMPOSERS",
    "Arrow",
    "Composer",
    "Composition",
    "Dume",
    "Linear",
    "Phatgoose",
    "Static",
    "compose",
    "fit_gates",
    "fit_ridge",
    "fit_weights",
    "plan_composition",
    "register_composer",
]
