"""What `auto` has chosen in a model, and when, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .._plumbing.output import text_table
from ..contract.memory import Memory
from ..strategies.choice import Choice, choices
from ..switch import check_module

_HEADER = ("equilibrium", "step", "strategy", "cosine", "cost", "why")


@dataclass(frozen=True)
class ChoiceRecord(Choice):
    """A choice of `auto` at one equilibrium of a model.

    Attributes:
        equilibrium: its name in the model.
    """

    equilibrium: str = ""


class ChoiceReport(list[ChoiceRecord]):
    """The choices of all equilibria, in the order of the steps at each; a table when printed."""

    def __repr__(self) -> str:
        if not self:
            return "auto has chosen nothing here: either none is at work, or none has gone back yet"
        rows = [
            (
                record.equilibrium,
                str(record.step),
                record.spec,
                "-" if record.cosine is None else f"{record.cosine:.4f}",
                "-" if record.cost is None else f"{record.cost:g}",
                record.why,
            )
            for record in self
        ]
        return text_table(_HEADER, rows)


def report_choice(model: nn.Module) -> ChoiceReport:
    """Return what `auto` has chosen at each equilibrium of a model.

    Of measurements in a row that chose the same, the first and the last are there.

    Args:
        model: the model, or a memory.

    Returns:
        A list of records (equilibrium, step, spec, cosine, cost, why), see `Choice`; a table when
        printed.

    Raises:
        TypeError: if `model` is no `torch.nn.Module`.
    """
    return ChoiceReport(
        ChoiceRecord(**vars(choice), equilibrium=_name(name))
        for name, memory in check_module(model).named_modules()
        if isinstance(memory, Memory)
        for choice in choices(memory)
    )


def _name(of_memory: str) -> str:
    """Return the name of what has a memory, where it is one of its own."""
    owner, _, last = of_memory.rpartition(".")
    return (owner if last == "memory" else of_memory) or "equilibrium"
