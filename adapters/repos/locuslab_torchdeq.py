"""locuslab/torchdeq: the deq-zoo (mdeq, deq-seq, deq-lm, ignn, deq-flow, deq-inr, deq-ddim).

The models call `get_deq(args)`, and the scripts call `add_deq_args(parser)`. So they only need
TorchDEQ with our hook; their own `--grad` then takes specs. deq-lm computes with the integer
`--grad` as a number of steps, so there a spec is converted to a number. Under `deq-phantom run` the
models are switched after they are built, whatever `--grad` says. The states of ignn (features x
nodes) and of deq-ddim (denoising steps x image) are one coupled system each, and not a batch.
"""

from __future__ import annotations

from dataclasses import replace

from deq_phantom_plugin.patching.adapter import IMPORT, Adapter, Edit, Project, SeamFile

ENABLE = f"{IMPORT}\ndeq_phantom_plugin.enable('torchdeq')"

MODEL = SeamFile(
    "a model",
    ("self.deq = get_deq(args)",),
    (
        Edit(
            "self.deq = get_deq(args)", "deq_phantom_plugin.set_grad(self.deq, {grad})", mode="run"
        ),
        Edit(
            "info = solver_stat_from_final_step(z_now, z_next, self.args.grad[-1])",
            "info = solver_stat_from_final_step(\n"
            "    z_now, z_next, deq_phantom_plugin.patching.steps(self.args.grad[-1]))",
            "replace",
            mode="patch",
            optional=True,
        ),
    ),
    imports=ENABLE,
)


def coupled(what: str, mark: str) -> SeamFile:
    """Return the seam of a model whose state is one coupled system, without a batch dimension.

    Args:
        what: the part of the file, for messages.
        mark: a text that tells this model apart from the others.
    """
    edit = Edit("self.deq = get_deq(args)", "self.deq.grad_batch_dim = None")
    return replace(
        MODEL, what=what, marks=(*MODEL.marks, mark), edits=(*MODEL.edits, edit), required=False
    )


ZOO = Project(
    "locuslab/torchdeq deq-zoo",
    "`--grad ...`",
    (
        MODEL,
        coupled("a graph layer", "class ImplicitGraph"),
        coupled("a chain of denoising steps", "class DEQLatentSpaceOpt"),
        SeamFile(
            "a training script",
            ("add_deq_args(parser)", "parse_args()"),
            (
                Edit(
                    "add_deq_args(parser)",
                    "deq_phantom_plugin.patching.default_grad(parser, {grad})",
                    mode="patch",
                ),
            ),
            required=False,
            imports=ENABLE,
        ),
    ),
)

ADAPTER = Adapter("locuslab/torchdeq", ("4f6bd5fa66dd991cad74fcc847c88061764cf8db",), (ZOO,))
