"""Auxiliary losses: pure functions of one routing decision, masked, and 1 at perfect balance."""

from .base import LOSSES, Loss, register_loss
from .contrastive import Contrastive
from .distillation import AssignmentBalancing, Distillation
from .efficiency import Efficiency
from .expert_router_coupling import ExpertRouterCoupling
from .gate_balance import GateBalance
from .importance_cv import ImportanceCV
from .load_balancing import LoadBalancing
from .load_cv import LoadCV
from .localized_balancing import LocalizedBalancing
from .modality_balancing import ModalityBalancing
from .modality_kl import ModalityKL
from .mutual_information import MutualInformation
from .null_balancing import NullBalancing
from .orthogonality import Orthogonality
from .parameter_penalty import ParameterPenalty
from .relu_sparsity import ReluSparsity
from .renyi_entropy import RenyiEntropy
from .selector_entropy import SelectorEntropy
from .similarity_guided import SimilarityGuided
from .simplicity_diversity import SimplicityDiversity
from .sparsity import SparsityBudget, SparsitySlack
from .specialization_balance import SpecializationBalance
from .tsallis_entropy import TsallisEntropy
from .z_loss import ZLoss

__all__ = [
    "LOSSES",
    "AssignmentBalancing",
    "Contrastive",
    "Distillation",
    "Efficiency",
    "ExpertRouterCoupling",
    "GateBalance",
    "ImportanceCV",
    "LoadBalancing",
    "LoadCV",
    "LocalizedBalancing",
    "Loss",
    "ModalityBalancing",
    "ModalityKL",
    "MutualInformation",
    "NullBalancing",
    "Orthogonality",
    "ParameterPenalty",
    "ReluSparsity",
    "RenyiEntropy",
    "SelectorEntropy",
    "SimilarityGuided",
    "SimplicityDiversity",
    "SparsityBudget",
    "SparsitySlack",
    "SpecializationBalance",
    "TsallisEntropy",
    "ZLoss",
    "register_loss",
]
