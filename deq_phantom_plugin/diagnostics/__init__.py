"""Whether a gradient is right: reports on a user's own model, and the theorems' conditions."""

from .choices import ChoiceRecord, ChoiceReport, report_choice
from .measure.ascent import (
    AscentCondition,
    MeasuredInnerProduct,
    ascent_condition,
    measured_inner_product,
)
from .measure.results import TunedEquilibrium
from .model import ModelReport, model_report
from .monitoring import Monitor, monitor
from .report import GradientReport, StrategyResult, gradient_report
from .tune import TuneReport, tune

__all__ = [
    "AscentCondition",
    "ChoiceRecord",
    "ChoiceReport",
    "GradientReport",
    "MeasuredInnerProduct",
    "ModelReport",
    "Monitor",
    "StrategyResult",
    "TuneReport",
    "TunedEquilibrium",
    "ascent_condition",
    "gradient_report",
    "measured_inner_product",
    "model_report",
    "monitor",
    "report_choice",
    "tune",
]
