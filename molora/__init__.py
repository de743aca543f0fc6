"""MoLoRA: mixtures of LoRA experts as a PEFT tuner. Importing it registers MOLORA with PEFT."""

from .calibration import CalibrationReport, calibrate
from .callback import RoutingCallback
from .collate import RoutingLabelCollator, TaskIdCollator
from .composition import (
    Ranking,
    RidgeStatistics,
    compose,
    fit_centroids,
    fit_gates,
    fit_ridge,
    fit_weights,
    rank_adapters,
)
from .config import MoloraConfig
from .consistency import consistency_loss
from .conversion import convert
from .describe import describe
from .experts import Experts, SiteSpec, register_experts
from .export import export_bundle, export_experts, export_lora, export_moe
from .extraction import Extraction, extract_lora
from .fixed_routing import fix_routing, static_routing, unmerged_prompts
from .gates import Gate, register_gate
from .grow import grow
from .labels import routing_labels
from .losses import Loss, register_loss
from .methods import Method, available_methods, register_method
from .model import MoloraModel
from .observe import after_step, observe, set_gradient_accumulation
from .register import register
from .routers import Router, register_router
from .routing import Routing, SiteInput
from .version import __version__

register()

__all__ = [
    "CalibrationReport",
    "Experts",
    "Extraction",
    "Gate",
    "Loss",
    "Method",
    "MoloraConfig",
    "MoloraModel",
    "Ranking",
    "RidgeStatistics",
    "Router",
    "Routing",
    "RoutingCallback",
    "RoutingLabelCollator",
    "SiteInput",
    "SiteSpec",
    "TaskIdCollator",
    "__version__",
    "after_step",
    "available_methods",
    "calibrate",
    "compose",
    "consistency_loss",
    "convert",
    "describe",
    "export_bundle",
    "export_experts",
    "export_lora",
    "export_moe",
    "extract_lora",
    "fit_centroids",
    "fit_gates",
    "fit_ridge",
    "fit_weights",
    "fix_routing",
    "grow",
    "observe",
    "rank_adapters",
    "register_experts",
    "register_gate",
    "register_loss",
    "register_method",
    "register_router",
    "routing_labels",
    "set_gradient_accumulation",
    "static_routing",
    "unmerged_prompts",
]
