"""sapientinc/HRM: the Hierarchical Reasoning Model; TinyRecursiveModels and URM have copies of it.

The loop does not iterate one map. It runs H_cycles times L_cycles L steps, with an H step after
every L_cycles of them. Only the last L step and the H step after it have a graph.

This pair of steps, L and then H on (z_H, z_L), is the map F of `npg`, `ift`, `jfb`, `upg` and of
reports, since it carries the graph in the repository's own training. One evaluation of our loop is
one L step, followed by an H step where one is due. `tbptt(k)` differentiates the last k of these:
k=1 is the repository's own training, and k=L_cycles is the last cycle. `tbptt(k='all')` and `bptt`
are backpropagation through the true loop. `upg(k)`, and strategies that wrap another one, such as
`guard('tbptt(k)')`, unroll the pair instead. With k above 1, each of the last k evaluations is then
an L step and an H step, so the value differs from that of the repository's loop.

The repository calls the inner model a second time for the target of Q, without autograd. That call
runs the loop without a gradient.
"""

from __future__ import annotations

from deq_phantom_plugin.patching.adapter import Adapter, Edit, Project

from . import recursive

INNER = "HierarchicalReasoningModel_ACTV1_Inner"

HRM = Project(
    "sapientinc/HRM",
    recursive.SWITCH,
    (
        recursive.model(
            "the model",
            (f"class {INNER}", "self.config.L_cycles"),
            config="HierarchicalReasoningModel_ACTV1Config",
            inner=INNER,
            levels="self.L_level =",
            steps="self.config.H_cycles * self.config.L_cycles",
            edit=Edit(
                "with torch.no_grad():",
                "def low(state):\n"
                "    z_H, z_L = state\n"
                "    return z_H, self.L_level(z_L, z_H + input_embeddings, **seq_info)\n\n"
                "def high(state):\n"
                "    z_H, z_L = state\n"
                "    return self.H_level(z_H, z_L, **seq_info), z_L\n\n"
                "def at(i, state):\n"
                "    state = low(state)\n"
                "    return high(state) if (i + 1) % self.config.L_cycles == 0 else state\n\n"
                "z_H, z_L = self.loop(\n"
                "    lambda state: high(low(state)), (carry.z_H, carry.z_L), at)",
                "replace",
                through="z_H = self.H_level(",
                scope=f"{INNER}.forward",
            ),
            known=("d6584be06ebb0bc5",),
        ),
        recursive.architecture("@HierarchicalReasoningModel_ACTV1"),
        recursive.TRAINING,
    ),
)

ADAPTER = Adapter("sapientinc/HRM", ("42410daaaf6ac8b266536d105a6e2362ffe40929",), (HRM,))
