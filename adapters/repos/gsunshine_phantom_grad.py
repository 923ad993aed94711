"""Gsunshine/phantom_grad: the authors' code of "On Training Implicit Models", with MDEQ.

It trains on CIFAR-10 and on ImageNet, in a folder each.
`MDEQWrapper.forward` unrolls `PG_STEPS` steps damped by `TAU`, which is `upg(k=PG_STEPS, lam=TAU)`.
The patch puts an `Equilibrium` in the place of that loop. `PG_STEPS` and `TAU` then have no effect
on the gradient. Each of the two folders has a wrapper of its own, with the same seam.
"""

from __future__ import annotations

from deq_phantom_plugin.patching.adapter import Adapter, Edit, Project, SeamFile

from . import GRAD_OPTION, set_grad

WRAPPER = SeamFile(
    "the wrapper around f",
    ("class MDEQWrapper", "pg_f_z1_list", "self.pg_steps"),
    (
        Edit(
            "if self.training:",
            "if self.training:\n"
            "    z1_list = self.equilibrium(lambda z: self.func(z, u), z1_list, step=train_step)",
            "replace",
            scope="MDEQWrapper.forward",
        ),
    ),
    {"MDEQWrapper.forward": ("ffb1fb67fa8faecf", "be687887929df375")},
    imports="",
)

CIFAR = Project(
    "Gsunshine/phantom_grad MDEQ_CIFAR",
    "`TRAIN: {GRAD: ...}` in its yaml, or `TRAIN.GRAD ...` at the end of its command line",
    (
        WRAPPER,
        SeamFile(
            "the network",
            ("MDEQWrapper(self.fullstage, self.tau, self.pg_steps)", "cfg['TRAIN']['PG_STEPS']"),
            (
                Edit(
                    "self.deq = MDEQWrapper(",
                    "self.deq.equilibrium = deq_phantom_plugin.patching.Equilibrium("
                    "cfg['TRAIN']['GRAD'])",
                    scope="MDEQNet.__init__",
                ),
            ),
        ),
        SeamFile(
            "the settings",
            ("_C.TRAIN.PG_STEPS", "_C.TRAIN.TAU"),
            (Edit("_C.TRAIN.PG_STEPS", "_C.TRAIN.GRAD = {grad}"),),
            imports="",
        ),
    ),
)

IMAGENET = Project(
    "Gsunshine/phantom_grad MDEQ_ImageNet",
    "`--grad ...`",
    (
        WRAPPER,
        SeamFile(
            "the network",
            ("MDEQWrapper(self.fullstage, self.tau, self.pg_steps)", "self.pg_steps = steps"),
            (
                Edit(
                    "self.deq = MDEQWrapper(",
                    "self.deq.equilibrium = deq_phantom_plugin.patching.Equilibrium({grad})",
                    scope="MDEQNet.__init__",
                ),
            ),
        ),
        SeamFile(
            "the training script",
            ("MDEQClsNet(args.tau, args.pg_steps)", "parser.parse_args()"),
            (GRAD_OPTION, set_grad("model = MDEQClsNet(")),
        ),
    ),
)

ADAPTER = Adapter(
    "Gsunshine/phantom_grad", ("9d321cf5180853d84036b0db45f7e07eaa4ba26c",), (CIFAR, IMAGENET)
)
