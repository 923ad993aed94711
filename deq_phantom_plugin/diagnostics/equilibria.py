"""The equilibria inside a model, by name."""

from __future__ import annotations

from torch import nn

from ..hosts import Host, find_equilibria, what_is_found


def named_equilibria(model: nn.Module) -> list[tuple[str, Host, nn.Module]]:
    """Return every equilibrium inside a model, with its name there and its host.

    A model that was compiled has the names of the one inside it.

    Raises:
        ValueError: if there is none.
    """
    names = {m: name.replace("_orig_mod.", "") for name, m in model.named_modules()}
    found = find_equilibria(model)
    if not found:
        raise ValueError(
            f"{what_is_found(model)} For a state at hand there is dpp.gradient_report(func, "
            "equilibrium, loss, params)"
        )
    return [(names[module] or "equilibrium", host, module) for host, module in found]
