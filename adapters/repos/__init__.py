"""One file a foreign repository: which versions are known, what changes in it, and why."""

from __future__ import annotations

from deq_phantom_plugin.patching.adapter import Edit

# What a script with an argument parser takes, and how the spec reaches its model.
GRAD_OPTION = Edit(
    "args = parser.parse_args()",
    "parser.add_argument('--grad', default={grad}, "
    "type=deq_phantom_plugin.patching.grad_argument,\n"
    "                    help='gradient of the equilibrium, such as upg or npg(k=9)')",
    "before",
)


def set_grad(anchor: str) -> Edit:
    """Return the edit that switches a model once it is built, after the statement `anchor`."""
    return Edit(anchor, "deq_phantom_plugin.patching.switch(model, args.grad)")
