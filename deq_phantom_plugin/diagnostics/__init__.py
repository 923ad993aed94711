"""Measurements of gradients on a user's own model.

Reports (`gradient_report`, `model_report`) compare methods with an exact gradient. `tune` chooses a
method, `monitor` logs numbers during training, and `report_choice` shows what `auto` chose.
`ascent_condition` and `measured_inner_product` check Theorem 1 of "On Training Implicit Models".
"""

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
