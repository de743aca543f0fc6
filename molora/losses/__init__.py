"""Auxiliary losses: pure functions of one routing decision, masked, and 1 at perfect balance."""

from .base import LOSSES, Loss, register_loss
from .load_balancing import LoadBalancing
from .z_loss import ZLoss

__all__ = ["LOSSES", "LoadBalancing", "Loss", "ZLoss", "register_loss"]
