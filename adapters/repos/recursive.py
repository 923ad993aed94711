"""What the adapters of recursive models share: they replace the model's loop by `patching.Loop`.

All these repositories descend from HRM's code. The settings of a model are a pydantic class, which
a Hydra configuration `config/arch/*.yaml` fills. The patch adds a field `grad` to both, so
`arch.grad=` on the command line reaches the loop. A spec of null selects the repository's own
training. `pretrain.py` passes the training step to the model.
"""

from __future__ import annotations

from typing import Literal

from deq_phantom_plugin.patching.adapter import YAML, Edit, SeamFile

SWITCH = "`arch.grad=...` on its command line, or `grad: ...` in its config/arch/*.yaml"

_TELL = (
    "deq_phantom_plugin.patching.tell_step(\n"
    "    train_state.model, {step}, getattr(config.arch, 'grad', None))"
)
_LOOP = "self.loop = deq_phantom_plugin.patching.Loop({spec}, steps={steps})"


def model(
    what: str,
    marks: tuple[str, ...],
    *,
    config: str,
    inner: str,
    levels: str,
    edit: Edit,
    known: tuple[str, ...],
    steps: str = "self.config.H_cycles",
    required: bool = True,
) -> SeamFile:
    """Return the seam of a file with one recursive model.

    Args:
        what: the part of the file, for messages.
        marks: see `SeamFile`.
        config: the class of the model's settings.
        inner: the class with the loop.
        levels: the statement in the constructor of `inner` after which the loop is made.
        edit: the edit that replaces the loop.
        known: the fingerprints of the function that `edit` changes.
        steps: the number of evaluations, as a Python expression.
        required: see `SeamFile`.
    """
    made = f"{inner}.__init__"
    own = _LOOP.format(spec="self.config.grad", steps=steps)
    named = _LOOP.format(spec="{grad}", steps=steps)
    edits = (
        Edit("forward_dtype: str", "grad: str | None = {grad}", scope=config, mode="patch"),
        Edit(levels, own, scope=made, mode="patch"),
        Edit(levels, named, scope=made, mode="run"),
        edit,
    )
    return SeamFile(what, marks, edits, {edit.scope: known}, required)


def architecture(name: str) -> SeamFile:
    """Return the seam of the Hydra configuration of a model.

    The second mark stands at the beginning of a line. So the whole configuration that a run has
    saved, where this key is indented, does not match.

    Args:
        name: the end of the model's `name` in the configuration.
    """
    return SeamFile(
        "the configuration",
        (name, "\nL_cycles:"),
        (Edit("L_cycles:", "grad: {grad}", mode="patch"),),
        required=False,
        endings=YAML,
    )


def training(ends: str, anchor: str, where: Literal["before", "after"], step: str) -> SeamFile:
    """Return the seam of the training script, whose `train_batch` gets a call of `tell_step`.

    That call passes the training step. It also raises an error if the patch of the model is
    missing.

    Args:
        ends: the statement by which the script tests for the end of training. It tells scripts
            apart.
        anchor: the statement beside which the call is inserted.
        where: whether the call goes before or after the anchor.
        step: the training step, counted from 0, as a Python expression.
    """
    told = Edit(anchor, _TELL.format(step=step), where, scope="train_batch", mode="patch")
    return SeamFile("the training script", ("def train_batch(", ends), (told,), required=False)


TRAINING = training(
    "if train_state.step > train_state.total_steps:",
    "train_state.step += 1",
    "after",
    "train_state.step - 1",
)
