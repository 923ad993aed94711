"""Whether a gradient is right: reports on a user's own model, and the theorems' conditions."""

from .model import ModelReport, model_report
from .monitoring import Monitor, monitor
from .report import GradientReport, StrategyResult, gradient_report

__all__ = [
    "GradientReport",
    "ModelReport",
    "Monitor",
    "StrategyResult",
    "gradient_report",
    "model_report",
    "monitor",
]
