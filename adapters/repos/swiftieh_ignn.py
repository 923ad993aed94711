"""SwiftieH/IGNN: node and graph classification.

`ImplicitGraph.forward` calls `ImplicitFunction.apply`, an autograd function that solves the forward
and the backward pass by fixed-point iteration, with at most `fw_mitr` and `bw_mitr` iterations. The
forward iteration stays. An `Equilibrium` takes the place of the backward iteration. The state has
the shape (features, nodes), and the nodes are coupled. So it is one system, and not a batch of
samples.
"""

from __future__ import annotations

from deq_phantom_plugin.patching.adapter import Adapter, Edit, Project, SeamFile

from . import GRAD_OPTION, set_grad

IGNN = Project(
    "SwiftieH/IGNN",
    "`--grad ...`",
    (
        SeamFile(
            "the layer",
            ("class ImplicitGraph", "ImplicitFunction.apply("),
            (
                Edit(
                    "self.b_direct = b_direct",
                    "self.equilibrium = deq_phantom_plugin.patching.Equilibrium("
                    "{grad}, batch_dim=None)",
                    scope="ImplicitGraph.__init__",
                ),
                Edit(
                    "return ImplicitFunction.apply(",
                    "adjacency = A if A_orig is None else A_orig\n"
                    "start = b_Omega if X_0 is None else X_0\n"
                    "with torch.no_grad():\n"
                    "    X, error, status, _ = ImplicitFunction.inn_pred(\n"
                    "        self.W, start, adjacency, b_Omega, phi, mitr=fw_mitr)\n"
                    "if status != 'converged':\n"
                    "    print('Iterations not converging!', error, status)\n"
                    "transposed = torch.transpose(adjacency, 0, 1)\n"
                    "return self.equilibrium(\n"
                    "    lambda H: phi(torch.spmm(transposed, (self.W @ H).T).T + b_Omega),\n"
                    "    X, start=start)",
                    "replace",
                    scope="ImplicitGraph.forward",
                ),
            ),
            {"ImplicitGraph.forward": ("73e6b581d2545fe3",)},
        ),
        SeamFile(
            "a training script",
            ("model = IGNN(", "parser.parse_args()"),
            (GRAD_OPTION, set_grad("model = IGNN(")),
            required=False,
        ),
    ),
)

ADAPTER = Adapter("SwiftieH/IGNN", ("b3c1ab31f0167827d44f1875cb8f84b725a06905",), (IGNN,))
