"""Whether a gradient is right: reports on a user's own model, and the theorems' conditions."""

from .choices import ChoiceRecord, ChoiceReport, report_choice
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
    "ChoiceRecord",
    "ChoiceReport",
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
    "report_choice",
]
