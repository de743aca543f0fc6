"""Gates: router logits -> routing weights. Selection and normalisation live here alone."""

from .base import GATES, Gate, register_gate
from .biased_sigmoid import BiasedSigmoid
from .binary_selectors import BinarySelectors
from .convex import Convex
from .decoupled import Decoupled
from .dense import Dense
from .dense_gradient import DenseGradient
from .dense_training import DenseTraining
from .distilled import Distilled
from .entropy_hybrid import EntropyHybrid
from .expert_choice import ExpertChoice
from .expert_dropout import ExpertDropout
from .expert_thresholds import ExpertThresholds
from .fixed import Fixed
from .global_workspace import GlobalWorkspace
from .grouped_sigmoid import GroupedSigmoid
from .grouped_top_k import GroupedTopK
from .gshard import GShard
from .independent import Independent, IndependentThreshold
from .indicator import Indicator
from .intuition import Intuition
from .learned_threshold import LearnedThreshold
from .noisy_top_k import NoisyTopK
from .null_experts import NullExperts
from .pruned_top_k import PrunedTopK
from .relu import Relu
from .sharpened_top_k import SharpenedTopK
from .sigmoid import Sigmoid
from .soft_slots import SoftSlots
from .sparse_mixer import SparseMixer
from .sparsegen import Sparsegen
from .stochastic import Stochastic
from .switch import Switch
from .threshold import Threshold
from .top_k import TopK
from .top_k_unnormalized import TopKUnnormalized
from .top_p import TopP
from .tree_top_k import TreeTopK
from .uniform import Uniform

__all__ = [
    "GATES",
    "BiasedSigmoid",
    "BinarySelectors",
    "Convex",
    "Decoupled",
    "Dense",
    "DenseGradient",
    "DenseTraining",
    "Distilled",
    "EntropyHybrid",
    "ExpertChoice",
    "ExpertDropout",
    "ExpertThresholds",
    "Fixed",
    "GShard",
    "Gate",
    "GlobalWorkspace",
    "GroupedSigmoid",
    "GroupedTopK",
    "Independent",
    "IndependentThreshold",
    "Indicator",
    "Intuition",
    "LearnedThreshold",
    "NoisyTopK",
    "NullExperts",
    "PrunedTopK",
    "Relu",
    "SharpenedTopK",
    "Sigmoid",
    "SoftSlots",
    "SparseMixer",
    "Sparsegen",
    "Stochastic",
    "Switch",
    "Threshold",
    "TopK",
    "TopKUnnormalized",
    "TopP",
    "TreeTopK",
    "Uniform",
    "register_gate",
]
