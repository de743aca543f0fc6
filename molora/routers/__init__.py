"""Routers: what a token's logits over the experts are computed from."""

from .activation import ActivationRouter
from .arrow import ArrowRouter, top_right_singular_vector
from .base import ROUTERS, Router, register_router
from .centroid import CentroidRouter
from .cosine import CosineRouter
from .dume import DumeRouter
from .expert_attention import ExpertAttentionRouter
from .first_pass import FirstPassRouter
from .glider import GliderRouter
from .inner import InnerRouter
from .instruction import InstructionRouter
from .layer_norm import LayerNormRouter
from .learned_temperature import LearnedTemperatureRouter
from .linear import LinearRouter
from .mlp import MLPRouter
from .modality import ModalityBiasRouter, ModalityGroupsRouter, OwnModalityRouter
from .output import OutputRouter
from .phatgoose import PhatgooseRouter
from .prompt_attention import PromptAttentionRouter
from .prompt_mean import PromptMeanRouter
from .random import RandomRouter
from .recurrent import RecurrentRouter
from .sequence import SequenceRouter
from .shared_linear import SharedLinearRouter
from .swiglu import SwiGLURouter
from .task import TaskRouter
from .task_embedding import TaskEmbeddingRouter
from .task_table import TaskTable
from .token_mask import TokenMaskRouter
from .tree import TreeRouter

__all__ = [
    "ROUTERS",
    "ActivationRouter",
    "ArrowRouter",
    "CentroidRouter",
    "CosineRouter",
    "DumeRouter",
    "ExpertAttentionRouter",
    "FirstPassRouter",
    "GliderRouter",
    "InnerRouter",
    "InstructionRouter",
    "LayerNormRouter",
    "LearnedTemperatureRouter",
    "LinearRouter",
    "MLPRouter",
    "ModalityBiasRouter",
    "ModalityGroupsRouter",
    "OutputRouter",
    "OwnModalityRouter",
    "PhatgooseRouter",
    "PromptAttentionRouter",
    "PromptMeanRouter",
    "RandomRouter",
    "RecurrentRouter",
    "Router",
    "SequenceRouter",
    "SharedLinearRouter",
    "SwiGLURouter",
    "TaskEmbeddingRouter",
    "TaskRouter",
    "TaskTable",
    "TokenMaskRouter",
    "TreeRouter",
    "register_router",
    "top_right_singular_vector",
]
