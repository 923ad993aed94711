"""The choices that `auto` has made in a model: what it chose, in which step, and why.

`auto` notes its choices in the memory of each equilibrium, see `noted`. `report_choice` collects
them from all memories of a model.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from .._plumbing.output import text_table
from ..contract.memory import Memory
from ..strategies.choice import Choice
from ..strategies.noted import choices
from ..switch import check_module

_HEADER = ("equilibrium", "step", "strategy", "cosine", "cost", "why")


@dataclass(frozen=True)
class ChoiceRecord(Choice):
    """A choice of `auto` at one equilibrium of a model.

    Attributes:
        equilibrium: the name of the equilibrium in the model.
    """

    equilibrium: str = ""


class ChoiceReport(list[ChoiceRecord]):
    """The choices of all equilibria, each equilibrium's by step; a table when printed."""

    def __repr__(self) -> str:
        if not self:
            return (
                "auto has chosen nothing here: either no equilibrium of this model has the method "
                "auto, or none has done a backward pass in training yet"
            )
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

    If several measurements in a row chose the same, the list has the first and the last of them.

    Args:
        model: the model, or a `dpp.Memory`.

    Returns:
        A list of records (equilibrium, step, spec, cosine, cost, why), see `Choice`. It prints as a
        table.

    Raises:
        TypeError: if `model` is no `torch.nn.Module`.
    """
    named = [(n, m) for n, m in check_module(model).named_modules() if isinstance(m, Memory)]
    owners = Counter(_owner(name) for name, _ in named)
    return ChoiceReport(
        ChoiceRecord(**vars(choice), equilibrium=_name(name, owners))
        for name, memory in named
        for choice in choices(memory)
    )


def _owner(of_memory: str) -> str:
    """Return the name of the module that a memory belongs to.

    Hosts call its memory `grad_memory`, or `grad_memory.0`, `grad_memory.1` and so on.
    """
    return re.sub(r"(^|\.)(grad_memory(\.\d+)?|memory)$", "", of_memory)


def _name(of_memory: str, owners: Counter[str]) -> str:
    """Return the name of an equilibrium, with its number where its module solves for several."""
    owner = _owner(of_memory)
    number = of_memory.rpartition(".")[2]
    several = owners[owner] > 1 and number.isdigit()
    return (owner or "equilibrium") + (f"[{number}]" if several else "")
