"""What adapters of recursive models share: their loop is given to `patching.Loop`.

All descend from HRM's code. A model's settings are a pydantic class that its Hydra configuration
`config/arch/*.yaml` fills, so that `arch.grad=` reaches the loop where both have the field; a spec
of null is the repository's own training. `pretrain.py` tells the training step.
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
        what: its part, for messages.
        marks: see `SeamFile`.
        config: the class of its settings.
        inner: the class with the loop.
        levels: the statement of its constructor after which the loop is made.
        edit: the change of the loop.
        known: the fingerprints of the function that it changes.
        steps: the number of evaluations, as an expression.
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
    """Return the Hydra configuration of the models whose `name` ends so.

    A mark at the beginning of a line passes over what a run has saved of its whole configuration.
    """
    return SeamFile(
        "the configuration",
        (name, "\nL_cycles:"),
        (Edit("L_cycles:", "grad: {grad}", mode="patch"),),
        required=False,
        endings=YAML,
    )


def training(ends: str, anchor: str, where: Literal["before", "after"], step: str) -> SeamFile:
    """Return the script whose `train_batch` tells the step, and refuses half a patch.

    Args:
        ends: how it asks for the end of the training, which tells scripts apart.
        anchor: the statement beside which it is told.
        where: on which side.
        step: the step, from 0, as an expression.
    """
    told = Edit(anchor, _TELL.format(step=step), where, scope="train_batch", mode="patch")
    return SeamFile("the training script", ("def train_batch(", ends), (told,), required=False)


TRAINING = training(
    "if train_state.step > train_state.total_steps:",
    "train_state.step += 1",
    "after",
    "train_state.step - 1",
)
