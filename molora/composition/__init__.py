"""Saved LoRA adapters as the experts of one mixture: how, and by what their weights are chosen."""

from .arrow import Arrow
from .base import COMPOSERS, Composer, register_composer
from .compose import compose
from .dume import Dume
from .glider import Glider
from .linear import Linear
from .lora_mixer import LoraMixer
from .mole import Mole
from .phatgoose import Phatgoose, fit_gates
from .plan import Composition, plan_composition
from .ranking import Ranking, rank_adapters
from .ridge import RidgeStatistics, fit_ridge
from .static import Static, fit_weights
from .ttmm import Ttmm, fit_centroids
from .x_lora import XLora

__all__ = [
    "COMPOSERS",
    "Arrow",
    "Composer",
    "Composition",
    "Dume",
    "Glider",
    "Linear",
    "LoraMixer",
    "Mole",
    "Phatgoose",
    "Ranking",
    "RidgeStatistics",
    "Static",
    "Ttmm",
    "XLora",
    "compose",
    "fit_centroids",
    "fit_gates",
    "fit_ridge",
    "fit_weights",
    "plan_composition",
    "rank_adapters",
    "register_composer",
]
