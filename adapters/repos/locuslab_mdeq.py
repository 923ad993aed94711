"""locuslab/mdeq: the first release of MDEQ.

`MDEQWrapper.forward` evaluates `f` once with a graph, and then applies `DEQModule2d.Backward`, an
autograd function that solves with Broyden's method on a second copy of `f`. The patch replaces both
by an `Equilibrium`. It works on the list of scales, so nothing is flattened in the backward pass.
`MODEL.B_THRES` then has no effect on the gradient. The repository still builds and updates the
second copy of `f`, which is not used.
"""

from __future__ import annotations

from deq_phantom_plugin.patching.adapter import Adapter, Edit, Project, SeamFile

MDEQ = Project(
    "locuslab/mdeq",
    "`MODEL: {GRAD: ...}` in its yaml, or `MODEL.GRAD ...` at the end of its command line",
    (
        SeamFile(
            "the wrapper around f",
            ("class MDEQWrapper", "self.func_copy", "self.Backward"),
            (
                Edit(
                    "if self.training:",
                    "if self.training:\n"
                    "    new_z1 = self.equilibrium(\n"
                    "        lambda z: DEQFunc2d.f(self.func, z, u, threshold, train_step),\n"
                    "        new_z1, step=train_step)",
                    "replace",
                    scope="MDEQWrapper.forward",
                ),
            ),
            {"MDEQWrapper.forward": ("845a85662c644280",)},
            imports="",
        ),
        SeamFile(
            "the network",
            ("class MDEQNet", "MDEQWrapper(self.fullstage, self.fullstage_copy)"),
            (
                Edit(
                    "self.deq = MDEQWrapper(",
                    "self.deq.equilibrium = deq_phantom_plugin.patching.Equilibrium("
                    "cfg['MODEL']['GRAD'])",
                    scope="MDEQNet.__init__",
                ),
            ),
        ),
        SeamFile(
            "the settings",
            ("_C.MODEL.F_THRES", "_C.MODEL.B_THRES"),
            (Edit("_C.MODEL.B_THRES", "_C.MODEL.GRAD = {grad}"),),
            imports="",
        ),
    ),
)

ADAPTER = Adapter("locuslab/mdeq", ("20e8a4074656c71781ebc3b1a98b81ff48cf8ff9",), (MDEQ,))
