"""Routers: what a token's logits over the experts are computed from."""

from .activation import ActivationRouter
from .base import ROUTERS, Router, register_router
from .linear import LinearRouter
from .mlp import MLPRouter
from .random import RandomRouter

__all__ = [
    "ROUTERS",
    "ActivationRouter",
    "LinearRouter",
    "MLPRouter",
    "RandomRouter",
    "Router",
    "register_router",
]
