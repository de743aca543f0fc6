"""Auxiliary losses: pure functions of one routing decision, masked, and 1 at perfect balance."""

from .base import LOSSES, Loss, register_loss
from .contrastive import Contrastive
from .distillation import AssignmentBalancing, Distillation
from .efficiency import Efficiency
from .importance_cv import ImportanceCV
from .load_balancing import LoadBalancing
from .localized_balancing import LocalizedBalancing
from .null_balancing import NullBalancing
from .parameter_penalty import ParameterPenalty
from .selector_entropy import SelectorEntropy
from .simplicity_diversity import SimplicityDiversity
from .sparsity import SparsityBudget, SparsitySlack
from .tsallis_entropy import TsallisEntropy
from .z_loss import ZLoss

__all__ = [
    "LOSSES",
    "AssignmentBalancing",
    "Contrastive",
    "Distillation",
    "Efficiency",
    "ImportanceCV",
    "LoadBalancing",
    "LocalizedBalancing",
    "Loss",
    "NullBalancing",
    "ParameterPenalty",
    "SelectorEntropy",
    "SimplicityDiversity",
    "SparsityBudget",
    "SparsitySlack",
    "TsallisEntropy",
    "ZLoss",
    "register_loss",
]
