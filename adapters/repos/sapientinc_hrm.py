"""sapientinc/HRM: the Hierarchical Reasoning Model; TinyRecursiveModels and URM have copies of it.

Its loop is no iteration of one map: H_cycles times L_cycles L steps, and an H step after every
L_cycles of them. All run without a graph but the last L step and the H step after it.

That pair, L and then H on (z_H, z_L), is the map F of `npg`, `ift`, `jfb`, `upg` and of reports: it
is what carries the graph in their own training. One evaluation of the loop is one L step, with the
H step where one is due, and `tbptt(k)` counts these backwards: k=1 is their own training, L_cycles
are the last cycle, "all" and `bptt` are backpropagation through the true loop. `upg(k)`, and what
wraps a strategy, such as `guard('tbptt(k)')`, unroll the pair instead: with k above 1 the last k
evaluations are an L and an H step each, and the value is no longer that of their loop.

The second call of the inner model, for the target of Q, is without autograd and runs the loop.
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
