"""UbiquantAI/URM: the Universal Reasoning Model, and the TRM beside it.

`forward` of the inner model runs H_cycles - 1 cycles without a graph, and the last one with one.
One evaluation of our loop is one H cycle. In URM, a cycle adds the input and applies all layers to
the hidden state, L_cycles times. In TRM, it is L_cycles steps of z_L, and then one step of z_H.

The repository's `hrm_act_v1.py` is a copy of HRM's file. The adapter `sapientinc_hrm` patches it.
`hrm_act_v2.py` has no loop.
"""

from __future__ import annotations

from deq_phantom_plugin.patching.adapter import Adapter, Edit, Project

from . import recursive
from .samsung_trm import PAIR

URM = Project(
    "UbiquantAI/URM",
    recursive.SWITCH,
    (
        recursive.model(
            "the model",
            ("class URM_Inner", "current_hidden"),
            config="URMConfig",
            inner="URM_Inner",
            levels="self.layers = nn.ModuleList(",
            edit=Edit(
                "hidden_states = carry.current_hidden",
                "def cycle(hidden_states):\n"
                "    for _ in range(self.config.L_cycles):\n"
                "        hidden_states = hidden_states + input_embeddings\n"
                "        for layer in self.layers:\n"
                "            hidden_states = layer(hidden_states=hidden_states, **seq_info)\n"
                "    return hidden_states\n\n"
                "hidden_states = self.loop(cycle, carry.current_hidden)",
                "replace",
                through="for _ in range(self.config.L_cycles):",
                scope="URM_Inner.forward",
            ),
            known=("2edc8ddfb0458e2f",),
        ),
        recursive.model(
            "the TRM",
            ("class TRM_Inner", "z_H=z_H.detach(), z_L=z_L.detach()"),
            config="TRMConfig",
            inner="TRM_Inner",
            levels="self.L_level =",
            edit=Edit(
                "it = 0",
                PAIR,
                "replace",
                through="z_H = self.L_level(z_H, z_L,",
                scope="TRM_Inner.forward",
            ),
            known=("10425181ae0c82b1",),
            required=False,
        ),
        recursive.architecture("@URM"),
        recursive.architecture("@TRM"),
        recursive.training(
            "if train_state.step >= train_state.total_steps:",
            "compute_target_q = train_state.step",
            "before",
            "train_state.step",
        ),
    ),
)

ADAPTER = Adapter("UbiquantAI/URM", ("41de2c38d3dda7bb3a5c13b61a590125e5df1bd9",), (URM,))
