"""locuslab/EqR: the Equilibrium Reasoner, and the TRM with which it is compared.

`deep_recursion` of the inner network runs `latent_recursion` H_cycles - 1 times without a graph,
and once with a graph. One evaluation of our loop is one `latent_recursion` of (z_H, z_L).

Each level of EqR adds noise (`noise_scale`), which every evaluation draws again, in evaluation mode
too. This has the following consequences:

- `tbptt`, `bptt`, `jfb` and `upg` differentiate the evaluations with the noise that they had. They
  draw as often as the repository's own training, which stays the same to the bit. The same holds
  for `ift` and `exact`: their map is the last evaluation with its noise. These two warn once that
  F is not the same each time.
- `npg` and `npg_rr` evaluate F once more for their graph, with new noise, so later draws differ
  from those of the repository. The value is that of the loop.
- `reversible` evaluates F again in the backward pass, and warns that F is not deterministic.
- The residuals in reports do not fall below the noise.
"""

from __future__ import annotations

from deq_phantom_plugin.patching.adapter import Adapter, Edit, Project, SeamFile

from . import recursive

INNER = "InnerNetwork"


def _model(what: str, config: str, required: bool = True) -> SeamFile:
    return recursive.model(
        what,
        (f"class {config}", f"class {INNER}", "def deep_recursion"),
        config=config,
        inner=INNER,
        levels="self.L_level =",
        edit=Edit(
            "with torch.no_grad():",
            "return self.loop(\n"
            "    lambda state: self.latent_recursion(*state, x, seq), (z_H, z_L))",
            "replace",
            through="return self.latent_recursion(",
            scope=f"{INNER}.deep_recursion",
        ),
        known=("e6101a84f547508b",),
        required=required,
    )


EQR = Project(
    "locuslab/EqR",
    recursive.SWITCH,
    (
        _model("the model", "EqRConfig"),
        _model("the TRM", "TRMConfig", required=False),
        recursive.architecture("@EqRModel"),
        recursive.architecture("@TRMModel"),
        recursive.TRAINING,
    ),
)

ADAPTER = Adapter("locuslab/EqR", ("4d45856c05b47de33512d4398c863f4b7fbf721c",), (EQR,))
