"""Routers: what a token's logits over the experts are computed from."""

from .activation import ActivationRouter
from .base import ROUTERS, Router, register_router
from .cosine import CosineRouter
from .linear import LinearRouter
from .mlp import MLPRouter
from .output import OutputRouter
from .random import RandomRouter
from .sequence import SequenceRouter
from .task import TaskRouter

__all__ = [
    "ROUTERS",
    "ActivationRouter",
    "CosineRouter",
    "LinearRouter",
    "MLPRouter",
    "OutputRouter",
    "RandomRouter",
    "Router",
    "SequenceRouter",
    "TaskRouter",
    "register_router",
]
