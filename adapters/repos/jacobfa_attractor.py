"""jacobfa/Attractor: a language model whose last block is iterated to a fixed point.

`Attractor._refine` solves y = f(y, c), and attaches the gradient by an autograd function of the
repository, which `config.backward_type` selects. The class `EQLM` is an older copy of the model.
The repository's gradient stays, and is used as long as `config.grad` is null. A named gradient
replaces it. The repository's own gradients have these specs here:

    onestep     npg(k=2, lam=1.0), with clip=adjoint_grad_clip if that is set; it is not one step
    anderson    ift(solver='anderson', tol=backward_tol, max_iter=backward_max_iter)
    picard      ift(solver='fixed_point', ...) with the same arguments

The last two stop when the change of the adjoint is small; `ift` stops when its residual is small. F
is evaluated as in the repository: with a fixed c, and with the block in evaluation mode. No
gradient flows through the start, which is c, unless a strategy owns the solve (`bptt`,
`reversible`).

The class `Parcae` draws the depth of a loop. It is not patched.
"""

from __future__ import annotations

from deq_phantom_plugin.patching.adapter import Adapter, Edit, Project, SeamFile

_OWN = (
    "solver = 'anderson' if config.backward_type == 'anderson' else 'fixed_point'\n"
    "own = (\n"
    "    f'ift(solver={solver!r}, tol={config.backward_tol}, '\n"
    "    f'max_iter={config.backward_max_iter})')\n"
    "if config.backward_type == 'onestep':\n"
    "    own = f'npg(k=2, lam=1.0, clip={config.adjoint_grad_clip})'\n"
)
_MADE = "self.equilibrium = deq_phantom_plugin.patching.Equilibrium("
_REFINED = (
    "def func(y):\n"
    "    with self._deterministic_fp():\n"
    "        return self._f(y, c, freqs_cis, attention_mask)\n\n"
    "y_star = self.equilibrium(\n"
    "    func, y_star_ng, c,\n"
    "    own=lambda: self._attach_implicit_grad(y_star_ng, c, freqs_cis, attention_mask))"
)


def _model(name: str, attach: str, function: str) -> SeamFile:
    """Return the seam of a file with one of the two models.

    Args:
        name: the class of the model.
        attach: the fingerprint of the method that attaches the repository's own gradient.
        function: the fingerprint of the autograd function.
    """
    made = f"{name}.__init__"
    return SeamFile(
        f"the model {name}",
        (f"class {name}(nn.Module)", "class _IFTAttach"),
        (
            Edit("self.step = 0", f"{_OWN}{_MADE}config.grad, own=own)", scope=made, mode="patch"),
            Edit("self.step = 0", f"{_OWN}{_MADE}{{grad}}, own=own)", scope=made, mode="run"),
            Edit(
                "y_star = self._attach_implicit_grad(",
                _REFINED,
                "replace",
                scope=f"{name}._refine",
            ),
        ),
        {
            f"{name}._refine": ("613b848e3ba039b5",),
            f"{name}._attach_implicit_grad": (attach,),
            "_IFTAttach": (function,),
        },
    )


def _settings(name: str) -> SeamFile:
    """Return the seam of a file with a settings class, which gets the field `grad`."""
    field = Edit("backward_type:", "grad: Optional[str] = {grad}", scope=name, mode="patch")
    marks = (f"class {name}(Config)", "backward_type:")
    return SeamFile(f"the settings {name}", marks, (field,), imports="")


ATTRACTOR = Project(
    "jacobfa/Attractor",
    "`model_overwrite: {grad: ...}` in its launch_configs/*.yaml, null for the repository's own",
    (
        _model("Attractor", "b0b1804a0372be6e", "ac04e7f07f7e371d"),
        _model("EQLM", "b0b1804a0372be6e", "e485889aace85878"),
        _settings("AttractorConfig"),
        _settings("EQLMConfig"),
        SeamFile(
            "the training script",
            ("def train_step(", 'model.step = state["microbatch_step"]'),
            (
                Edit(
                    'model.step = state["microbatch_step"]',
                    "deq_phantom_plugin.patching.tell_step(\n"
                    "    model, state['optimizer_step'],\n"
                    "    getattr(cfg.model_config, 'grad', None), cfg.max_steps)",
                    scope="train_step",
                    mode="patch",
                ),
            ),
            required=False,
        ),
    ),
)

ADAPTER = Adapter("jacobfa/Attractor", ("fcf045f9fb9d458f9e1574bd4036cd2fb63b3697",), (ATTRACTOR,))
