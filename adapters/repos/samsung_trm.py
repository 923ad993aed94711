"""SamsungSAILMontreal/TinyRecursiveModels: TRM, and its variants with one latent and with six.

`forward` of the inner model runs H_cycles - 1 cycles without a graph, and the last one with one.
One evaluation of our loop is one H cycle: L_cycles steps of the latents, and then one step of the
answer. The state is (z_H, z_L). In `trm_singlez` it is z_L alone. In `trm_hier6` it is z_H and the
latents that a cycle changes, which are the first L_cycles of the six.

The repository's `hrm.py` is a copy of HRM's file. The adapter `sapientinc_hrm` patches it.
"""

from __future__ import annotations

from deq_phantom_plugin.patching.adapter import Adapter, Edit, Project, SeamFile

from . import recursive

INNER = "TinyRecursiveReasoningModel_ACTV1_Inner"

PAIR = (
    "def cycle(state):\n"
    "    z_H, z_L = state\n"
    "    for _L_step in range(self.config.L_cycles):\n"
    "        z_L = self.L_level(z_L, z_H + input_embeddings, **seq_info)\n"
    "    return self.L_level(z_H, z_L, **seq_info), z_L\n\n"
    "z_H, z_L = self.loop(cycle, (carry.z_H, carry.z_L))"
)
SINGLE = (
    "def cycle(z_L):\n"
    "    for _L_step in range(self.config.L_cycles):\n"
    "        z_L = self.L_level(z_L + input_embeddings, **seq_info)\n"
    "    return self.L_level(z_L, **seq_info)\n\n"
    "z_L = self.loop(cycle, carry.z_L)"
)
SIX = (
    "z_L = [carry.z_L1, carry.z_L2, carry.z_L3, carry.z_L4, carry.z_L5, carry.z_L6]\n"
    "changed, kept = z_L[:self.config.L_cycles], z_L[self.config.L_cycles:]\n\n"
    "def cycle(state):\n"
    "    z_H, z_L = state[0], [*state[1], *kept]\n"
    "    for _L_step in range(self.config.L_cycles):\n"
    "        z_L_ = z_L[0] + z_L[1] + z_L[2] + z_L[3] + z_L[4] + z_L[5]\n"
    "        z_L[_L_step] = self.L_level(z_L_, z_H + input_embeddings, **seq_info)\n"
    "    z_L_ = z_L[0] + z_L[1] + z_L[2] + z_L[3] + z_L[4] + z_L[5]\n"
    "    return self.L_level(z_H, z_L_, **seq_info), z_L[:self.config.L_cycles]\n\n"
    "z_H, changed = self.loop(cycle, (carry.z_H, changed))\n"
    "z_L = [*changed, *kept]"
)


def _model(what: str, mark: str, new: str, last: str, known: str, required: bool) -> SeamFile:
    """Return the seam of a variant.

    Args:
        what: the part of the file, for messages.
        mark: a text that tells this variant apart.
        new: the code that replaces the loop.
        last: the beginning of the last statement of the loop.
        known: the fingerprint of `forward`.
        required: see `SeamFile`.
    """
    return recursive.model(
        what,
        (f"class {INNER}", mark),
        config="TinyRecursiveReasoningModel_ACTV1Config",
        inner=INNER,
        levels="self.L_level =",
        edit=Edit("it = 0", new, "replace", through=last, scope=f"{INNER}.forward"),
        known=(known,),
        required=required,
    )


TRM = Project(
    "SamsungSAILMontreal/TinyRecursiveModels",
    recursive.SWITCH,
    (
        _model(
            "the model",
            "z_H=z_H.detach(), z_L=z_L.detach()",
            PAIR,
            "z_H = self.L_level(z_H, z_L,",
            "454ad70cdaf71483",
            True,
        ),
        _model(
            "the model of one latent",
            "z_out = z_L",
            SINGLE,
            "z_L = self.L_level(z_L, **",
            "f8fbc9c0531e76f7",
            False,
        ),
        _model(
            "the model of six latents",
            "carry.z_L6",
            SIX,
            "z_H = self.L_level(z_H, z_L_,",
            "4782fc54c42d3a43",
            False,
        ),
        recursive.architecture("@TinyRecursiveReasoningModel_ACTV1"),
        recursive.TRAINING,
    ),
)

ADAPTER = Adapter(
    "SamsungSAILMontreal/TinyRecursiveModels",
    ("e7b68717f0a6c4cbb4ce6fbef787b14f42083bd9",),
    (TRM,),
)
