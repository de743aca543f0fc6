"""Static stand-ins for token routing, fitted to data and measured against what they replace."""

from .calibrate import calibrate, fit, fit_each
from .divergence import compare_logits
from .fits import METHODS
from .moments import collect_moments
from .report import CalibrationReport, Divergence, SiteReport, comparison

__all__ = [
    "METHODS",
    "CalibrationReport",
    "Divergence",
    "SiteReport",
    "calibrate",
    "collect_moments",
    "compare_logits",
    "comparison",
    "fit",
    "fit_each",
]
