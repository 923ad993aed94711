"""locuslab/deq: MDEQ-Vision and DEQ-Sequence.

Both code bases solve `(I - J^T) g = v` in a tensor hook, which calls `torch.cuda.synchronize()`.
They register the hook in the `if self.training:` block of `MDEQNet._forward` and of
`DEQTransformerLM._forward`. The patch removes the hook, and puts an `Equilibrium` in the place of
it and of the forward pass to which it belongs. That forward pass stays for the Jacobian
regularisation only, so training steps without regularisation save one evaluation. The settings
`B_SOLVER` and `B_THRES` (`--b_solver`, `--b_thres`) then have no effect on the gradient.
"""

from __future__ import annotations

from deq_phantom_plugin.patching.adapter import Adapter, Edit, Project, SeamFile

from . import GRAD_OPTION

VISION = Project(
    "locuslab/deq MDEQ-Vision",
    "`DEQ: {GRAD: ...}` in its yaml, or `DEQ.GRAD ...` at the end of its command line",
    (
        SeamFile(
            "the network",
            ("class MDEQNet", "def backward_hook", "self.b_solver"),
            (
                Edit(
                    "self.hook = None",
                    "self.equilibrium = deq_phantom_plugin.patching.Equilibrium("
                    "cfg['DEQ']['GRAD'])",
                    scope="MDEQNet.__init__",
                ),
                Edit(
                    "new_z1 = func(z1.requires_grad_())",
                    "if compute_jac_loss:\n"
                    "    z2 = z1.detach().requires_grad_()\n"
                    "    jac_loss = jac_loss_estimate(func(z2), z2)\n"
                    "new_z1 = self.equilibrium(func, z1, step=train_step)",
                    "replace",
                    through="self.hook = new_z1.register_hook",
                    scope="MDEQNet._forward",
                ),
            ),
            {"MDEQNet._forward": ("7a8e9e52cfcd8113",)},
        ),
        SeamFile(
            "the settings",
            ("_C.DEQ.F_SOLVER", "_C.DEQ.B_THRES"),
            (Edit("_C.DEQ.B_THRES", "_C.DEQ.GRAD = {grad}"),),
            imports="",
        ),
    ),
)

SEQUENCE = Project(
    "locuslab/deq DEQ-Sequence",
    "`--grad ...`",
    (
        SeamFile(
            "the network",
            ("class DEQTransformerLM", "def backward_hook", "self.b_solver"),
            (
                Edit(
                    "self.hook = None",
                    "self.equilibrium = deq_phantom_plugin.patching.Equilibrium({grad})",
                    scope="DEQTransformerLM.__init__",
                ),
                Edit(
                    "z1s.requires_grad_()",
                    "if compute_jac_loss:\n"
                    "    z2s = z1s.detach().requires_grad_()\n"
                    "    jac_loss = jac_loss_estimate(self.func(z2s, *func_args), z2s, vecs=1)\n"
                    "new_z1s = self.equilibrium(\n"
                    "    lambda z: self.func(z, *func_args), z1s, step=train_step)",
                    "replace",
                    through="self.hook = new_z1s.register_hook",
                    scope="DEQTransformerLM._forward",
                ),
            ),
            {"DEQTransformerLM._forward": ("aa23ee300cda8639",)},
        ),
        SeamFile(
            "the training script",
            ("DEQTransformerLM(", "parser.parse_args()", "args.n_all_param"),
            (
                GRAD_OPTION,
                Edit(
                    "args.n_all_param = sum(",
                    "deq_phantom_plugin.patching.switch(model, args.grad)",
                    "before",
                ),
            ),
        ),
    ),
)

ADAPTER = Adapter("locuslab/deq", ("1fb7059d6d89bb26d16da80ab9489dcc73fc5472",), (VISION, SEQUENCE))
