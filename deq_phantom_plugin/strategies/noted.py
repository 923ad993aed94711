"""What `auto` remembers of what it chose, in a memory."""

from __future__ import annotations

from dataclasses import asdict
from types import NoneType
from typing import Any

from ..contract.memory import Memory
from .choice import OFF, Choice

NOTED = "auto"
"""Its name in a memory's histories."""


class Log:
    """What a memory keeps of one `auto`: when it was measured, and what was chosen.

    Args:
        memory: of the equilibrium.
        of: the strategy, as its spec; what another one chose is not in force.

    Attributes:
        memory: the memory.
    """

    def __init__(self, memory: Memory, of: str) -> None:
        self.memory, self._of = memory, of

    @property
    def _kept(self) -> dict[str, Any]:
        kept: dict[str, Any] = self.memory.histories.get(NOTED, {})
        return kept

    @property
    def measured(self) -> int | None:
        """The step of the last measurement, None before the first."""
        return self._kept["measured"] if self._kept.get("of") == self._of else None

    @property
    def last(self) -> Choice | None:
        """The choice that is in force, None before the first."""
        return None if self.measured is None else Choice(**self._kept["choices"][-1])

    @property
    def is_off(self) -> bool:
        """Whether it is one for states that are not at their equilibrium."""
        return self.last is not None and self.last.trouble == OFF

    def note(self, choice: Choice) -> None:
        """Keep a choice; of those in a row that are the same, the first and the last."""
        known = list(self._kept.get("choices", []))
        if [c["spec"] for c in known[-2:]] == [choice.spec] * 2 and self.measured is not None:
            known.pop()
        kept = {"of": self._of, "measured": choice.step, "choices": [*known, asdict(choice)]}
        self.memory.histories[NOTED] = kept


def check_kept(key: str, kept: Any) -> None:
    """Refuse what is no log of `auto`, of whatever one.

    Args:
        key: of what is to be loaded.
        kept: what it holds.

    Raises:
        ValueError: if it is none; names the key and what is accepted.
    """
    made = kept.get("choices") if isinstance(kept, dict) else None
    if not (
        isinstance(made, list)
        and made
        and all(map(_is_choice, made))
        and type(kept.get("of")) is str
        and kept.get("measured") == made[-1]["step"]
    ):
        raise ValueError(
            f"{key} is {kept!r:.60}; expected what auto keeps: a dict with 'of', its spec, "
            "'measured', the step of its last measurement, and 'choices'"
        )


def _is_choice(kept: Any) -> bool:
    numbers = (int, float, NoneType)
    kinds = {"step": (int,), "spec": (str,), "cosine": numbers, "cost": numbers, "why": (str,)}
    return (
        isinstance(kept, dict)
        and kept.keys() == kinds.keys()
        and all(type(kept[name]) in kind for name, kind in kinds.items())
    )


def choices(memory: Memory) -> list[Choice]:
    """Return what was chosen at an equilibrium, in the order of the steps."""
    return [Choice(**kept) for kept in memory.histories.get(NOTED, {}).get("choices", [])]
