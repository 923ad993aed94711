"""Adapters of foreign repositories, one file per repository.

The docstring of a file says how the repository computes its gradient, what the patch changes, and
why. Its `ADAPTER` names the known commits and the edits. `deq_phantom_plugin/patching/adapter.py`
explains the parts of an adapter.
"""

from __future__ import annotations

from deq_phantom_plugin.patching.adapter import Edit

# Adds the option `--grad` to a script with an argument parser. `set_grad` passes it to the model.
GRAD_OPTION = Edit(
    "args = parser.parse_args()",
    "parser.add_argument('--grad', default={grad}, "
    "type=deq_phantom_plugin.patching.grad_argument,\n"
    "                    help='gradient of the equilibrium, such as upg or npg(k=9)')",
    "before",
)


def set_grad(anchor: str) -> Edit:
    """Return the edit that switches the gradient of `model` after the statement `anchor`."""
    return Edit(anchor, "deq_phantom_plugin.patching.switch(model, args.grad)")
