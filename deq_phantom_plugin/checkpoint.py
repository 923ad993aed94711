"""What the memories of a model keep besides the step, beside the model's `state_dict`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .contract.memory import Memory, check_leaf, is_dense
from .strategies.noted import NOTED, check_kept
from .switch import check_module

# Names that DataParallel and averages, `torch.compile`, FSDP and activation checkpointing put in.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def memory_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return what a model's equilibria keep besides the step: warm starts, histories, failures.

    None of it is in the model's `state_dict`, whose keys and shapes do not change in training. It
    is this process's own, and is saved like that: `torch.save` beside the model, and
    `torch.load(weights_only=True)`.

    Args:
        model: the model, or one that wraps it (DDP, `torch.compile`); the names are the same.

    Returns:
        Tensors and plain values, by the name of each `Memory` in the model.
    """
    return {name: memory.kept() for name, memory in _memories(model).items()}


def load_memory_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Let a model's equilibria keep what those of another kept; all of it or nothing is loaded.

    Afterwards a memory that `state` does not name keeps nothing besides the step.

    Args:
        model: the model, or one that wraps it.
        state: what `memory_state_dict` has returned.

    Raises:
        ValueError: if it names a memory that the model does not have, or holds what none keeps;
            names the key and what is accepted.
    """
    memories = _memories(model)
    if not isinstance(state, Mapping):
        raise ValueError(f"{state!r:.60} is no dict; expected what dpp.memory_state_dict returns")
    there = ", ".join(map(repr, memories)) or "none"
    found: dict[str, Any] = {}
    for key, kept in state.items():
        name = key if key in memories else _unwrapped(key)
        if name not in memories or name in found:
            raise ValueError(
                f"{key!r:.60} names no memory of {type(model).__name__}; there are {there}"
            )
        found[name] = _checked(key, kept)
    for name, memory in memories.items():
        memory.restore(found.get(name) or _checked(name, {}))


def _memories(model: nn.Module) -> dict[str, Memory]:
    """Return a model's memories by their names without wrappers, where those tell them apart."""
    found = {
        name: memory
        for name, memory in check_module(model).named_modules()
        if isinstance(memory, Memory)
    }
    short = [_unwrapped(name) for name in found]
    names = [s if short.count(s) == 1 else name for s, name in zip(short, found, strict=True)]
    return dict(zip(names, found.values(), strict=True))


def _unwrapped(name: Any) -> str:
    return ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)


def _checked(key: str, kept: Any) -> dict[str, dict[str, Any]]:
    """Return a copy of what a memory kept once, with every part that there is today.

    Raises:
        ValueError: if it holds what no memory keeps; names the key and what is accepted.
    """
    accepted = ", ".join(map(repr, _PARTS))
    if not isinstance(kept, Mapping):
        raise ValueError(f"{key} is {kept!r:.60}; expected a dict of {accepted}")
    for part, held in kept.items():
        if part not in _PARTS:
            raise ValueError(f"{key} has the unknown part {part!r:.60}; there are {accepted}")
        if not (isinstance(held, Mapping) and all(isinstance(name, str) for name in held)):
            raise ValueError(f"{key}.{part} is {held!r:.60}; expected a dict with names as keys")
    return {
        part: {name: check(f"{key}.{part}.{name}", x) for name, x in kept.get(part, {}).items()}
        for part, check in _PARTS.items()
    }


def _count(key: str, value: Any) -> int:
    """Return in how many samples a kind of solve failed."""
    if key.rpartition(".")[2] not in ("forward", "adjoint"):
        raise ValueError(f"{key} is unknown; there are 'forward' and 'adjoint'")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} is {value!r:.60}; expected a whole number of at least 0")
    return value


def _plain(key: str, value: Any, depth: int = 0) -> Any:
    """Return a copy of a plain value: only these are read back by `weights_only=True`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if is_dense(value):
        tensor: Tensor = value.detach().clone()
        return tensor
    if depth < _DEEPEST:
        if type(value) in (list, tuple):
            return type(value)(_plain(key, item, depth + 1) for item in value)
        if type(value) is dict and all(isinstance(name, str) for name in value):
            return {name: _plain(f"{key}.{name}", v, depth + 1) for name, v in value.items()}
    raise ValueError(
        f"{key} is {value!r:.60}; expected None, a number, text, a dense tensor, or lists and "
        "dicts of them"
    )


def _history(key: str, value: Any) -> Any:
    """Return a copy of what a strategy noted, as far as it is known of which one it is."""
    if key.endswith(f".histories.{NOTED}"):
        check_kept(key, value)
    return _plain(key, value)


_DEEPEST = 10
_PARTS: Mapping[str, Callable[[str, Any], Any]]
_PARTS = {"warm_starts": check_leaf, "histories": _history, "failures": _count}
