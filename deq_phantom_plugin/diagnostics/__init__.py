"""Whether a gradient is right: reports on a user's own model, and the theorems' conditions."""

from .measure.ascent import (
    AscentCondition,
    MeasuredInnerProduct,
    ascent_condition,
    measured_inner_product,
)
from .model import ModelReport, model_report
from .monitoring import Monitor, monitor
from .report import GradientReport, StrategyResult, gradient_report

__all__ = [
    "AscentCondition",
    "GradientReport",
    "MeasuredInnerProduct",
    "ModelReport",
    "Monitor",
    "StrategyResult",
    "ascent_condition",
    "gradient_report",
    "measured_inner_product",
    "model_report",
    "monitor",
]
