"""Expert parametrisations: what an expert's parameters are and how they act."""

from .base import EXPERTS, Experts, SiteSpec, register_experts
from .factor_mixing import FactorMixingExperts
from .frozen_lora import FrozenLoraExperts
from .lora import LoraExperts
from .module_adapters import ModuleAdapterExperts
from .rank_pairs import RankPairExperts
from .residual_tree import ResidualTreeExperts
from .shards import ShardExperts
from .shared_factor import SharedAExperts, SharedBExperts
from .slots import SlotAdapterExperts, SlotLoraExperts
from .sparse_projection import SparseProjectionExperts
from .svd_segments import SvdSegmentExperts
from .up_bank import UpBankExperts
from .vectors import ScalingVectorExperts, SteeringVectorExperts

__all__ = [
    "EXPERTS",
    "Experts",
    "FactorMixingExperts",
    "FrozenLoraExperts",
    "LoraExperts",
    "ModuleAdapterExperts",
    "RankPairExperts",
    "ResidualTreeExperts",
    "ScalingVectorExperts",
    "ShardExperts",
    "SharedAExperts",
    "SharedBExperts",
    "SiteSpec",
    "SlotAdapterExperts",
    "SlotLoraExperts",
    "SparseProjectionExperts",
    "SteeringVectorExperts",
    "SvdSegmentExperts",
    "UpBankExperts",
    "register_experts",
]
