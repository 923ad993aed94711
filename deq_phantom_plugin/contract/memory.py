"""What an equilibrium remembers from one training step to the next."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .._plumbing.compilation import never_compiled
from .._plumbing.once import warn_once
from .._plumbing.trial import Trial
from .errors import AssumptionWarning

LARGEST_STEP = 2**53
"""The largest step. float64 tells whole numbers apart up to here."""


class Memory(nn.Module):
    """The training step of one equilibrium of one model, and what its strategy keeps.

    It is a module. So `dpp.set_step` finds it, it is copied with its model, and it is resumed
    through the model's `state_dict`. There it has one number, `step`, whatever strategy runs. The
    number is a float64, since averages of models add and scale what they find. It is -1 if nobody
    told the step. It is made when the dict is made, and is no buffer. So `half`, `to` and the
    messages between processes leave it alone. Checkpoints without it load, also strictly.

    What has the shape of a batch, or grows, goes through `dpp.memory_state_dict`.

    On the meta device no tensor has a value, and the number is not in the dict. (Loaders that build
    a model there, as those of Transformers and Accelerate, fill in each key as a parameter.)

    Attributes:
        step: the training step; None until `dpp.set_step` or a host has told it.
        total: the length of training in steps; None until `dpp.set_step` has told it. Not saved.
        place: which of its model's memories it is, from 0; None until `dpp.set_step` has counted
            them. Not saved.
        counts: whether a strategy asked which call of its step it is in. Not saved.
        failures: the number of samples in which a solve failed, "forward" and "adjoint", see
            `guard`.
        histories: what strategies note over the steps, by name: tensors and plain values.
        findings: what `inspection` found out about F, by mode and structure of the state. Not saved
            or copied: another process, or a copy, asks for itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step: int | None = None
        self.total: int | None = None
        self.place: int | None = None
        self.counts = False
        self._calls = 0  # equilibria that were attached in this step
        self.failures: Counter[str] = Counter()
        self.histories: dict[str, Any] = {}
        self.findings: dict[tuple[Any, ...], Any] = {}
        self._doubts = 0
        self._warm_starts: dict[str, Tensor] = {}
        self._on_meta = _weights_go_to_meta()

    def warm_start(self, name: str, like: Tensor) -> Tensor | None:
        """Return the tensor kept under `name`, cast to the dtype of `like`.

        None if there is no such tensor, or if it has another shape.
        """
        kept = self._warm_starts.get(name)
        if kept is None or kept.shape != like.shape or kept.is_complex() != like.is_complex():
            return None
        return kept.to(device=like.device, dtype=like.dtype)

    def keep(self, name: str, value: Tensor) -> None:
        """Keep a tensor, detached, under `name` for the next step; not inside of a trial."""
        if not Trial.depth():
            self._warm_starts[name] = value.detach()

    def tell(self, step: int, total: int | None, place: int) -> None:
        """Take note of where training is, see `dpp.set_step`."""
        if step != self.step:
            self._calls = 0
        self.step, self.place = step, place
        self.total = self.total if total is None else total

    def number_of_call(self) -> int:
        """Return which call of its step the equilibrium is in, from 0."""
        self.counts = True
        return self._calls

    @never_compiled  # the number changes in each call, which would compile each time
    def count(self) -> None:
        """Take note that an equilibrium was attached. Trials and evaluation do not count."""
        if self.training and not Trial.depth():
            self._calls += 1

    def doubt(self) -> None:
        """Ask again what F is like, since a solve that relied on the answer has stopped short.

        The answer may change: weights that begin at zero couple nothing yet. It is asked again at
        the first doubt, the second, the fourth and so on. So a solve that always stops short does
        not pay for it at every step.
        """
        if Trial.depth():
            return
        self._doubts += 1
        if self._doubts & (self._doubts - 1) == 0:
            self.findings.clear()

    # --- what is kept besides the step ------------------------------------------------------------

    def kept(self) -> dict[str, dict[str, Any]]:
        """Return everything but the step, in plain types and tensors; `dpp.memory_state_dict`."""
        return {
            "warm_starts": dict(self._warm_starts),
            "histories": copy.deepcopy(self.histories),
            "failures": dict(self.failures),
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Replace everything but the step by what another memory kept. It is not checked."""
        self._warm_starts = dict(kept["warm_starts"])
        self.histories = copy.deepcopy(kept["histories"])
        self.failures = Counter(kept["failures"])

    # --- the model's state_dict -------------------------------------------------------------------

    def _number(self) -> Tensor:
        # Not an inference tensor, since averages change it in place. On the CPU, wherever the model
        # is, since PyTorch sends tensors without a dimension between processes as they are.
        with torch.inference_mode(False):
            step = -1 if self.step is None else self.step
            return torch.tensor(step, dtype=torch.float64, device="cpu")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self._on_meta:
            destination[prefix + "step"] = self._number()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, start = f"{prefix}step", f"{prefix}warm_start."  # these were here in 0.1
        try:
            step = self.step if self._on_meta else None
            if key in state_dict:
                step = _step(key, state_dict[key])
            kept = {
                name[len(start) :]: check_leaf(name, value)
                for name, value in state_dict.items()
                if name.startswith(start)
            }
        except ValueError as error:
            error_msgs.append(str(error))
            return
        self.step, self._on_meta = step, False
        self._warm_starts.update(kept)
        if strict:
            known = {key, *(start + name for name in kept)}
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Name the number to PyTorch's functions for distributed checkpoints.

        These functions keep what some module calls a parameter or a buffer, and lose every other
        key. They ask one module at a time, and without autograd. A loader that asks with autograd
        on moves what it finds, so it must not find the number.
        """
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not (recurse or torch.is_grad_enabled()):
            yield f"{prefix}.step" if prefix else "step", self._number()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Memory:
        self._on_meta = fn(torch.empty(0, device="cpu")).is_meta
        super()._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> Memory:
        """See `torch.nn.Module.train`. A model that is used has left the meta device."""
        self._on_meta = False
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "findings": {}, "_doubts": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        new = {"findings": {}, "_doubts": 0, "histories": {}, "_on_meta": False}
        new |= {"total": None, "place": None, "counts": False, "_calls": 0}
        super().__setstate__({**new, **state})  # pickles of 0.1 lack them

    def extra_repr(self) -> str:
        """Show what is held."""
        failures = f", failures={dict(self.failures)}" if self.failures else ""
        histories = f", histories={sorted(self.histories)}" if self.histories else ""
        return f"step={self.step}, warm_starts={sorted(self._warm_starts)}{histories}{failures}"


def _weights_go_to_meta() -> bool:
    """Whether a module that is made now gets its weights on the meta device.

    The default device may say so. In Accelerate and Transformers 4 a parameter goes there when it
    is registered.
    """
    probe = torch.nn.Module()
    probe.register_parameter("weight", torch.nn.Parameter(torch.empty(0)))
    return probe.get_parameter("weight").is_meta


def _step(key: str, value: Any) -> int | None:
    """Return the step of a checkpoint: an average of steps need not be whole."""
    number = value
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_meta:
        with contextlib.suppress(RuntimeError):  # some kinds of tensor have none
            number = value.item()
    is_half = isinstance(value, Tensor) and value.dtype is torch.float16
    if is_half and isinstance(number, float) and number == math.inf:
        # A checkpoint cast to float16, which ends at 65,504.
        warn_once(
            "step lost",
            f"{key} is infinite, since the checkpoint was cast to float16, which ends at 65,504: "
            "the training step is not known. Call dpp.set_step(model, step) before the next step. "
            "This is said once.",
            AssumptionWarning,
        )
        return None
    fits = isinstance(number, Real) and not isinstance(number, bool)
    if not (fits and -math.inf < number <= LARGEST_STEP):
        raise ValueError(
            f"{key} is {value!r:.60}; expected a whole number of at least 0 or an average of such, "
            "-1 where no step was told"
        )
    return None if number < 0 else round(number)


def check_leaf(key: str, value: Any) -> Tensor:
    """Return a copy of a tensor, if a gradient could be like it.

    Raises:
        ValueError: if it could not; names the key.
    """
    if is_dense(value) and (value.is_floating_point() or value.is_complex()):
        copied: Tensor = value.detach().clone()
        return copied
    raise ValueError(f"{key} is {value!r:.60}; expected a dense tensor of floating-point numbers")


def is_dense(value: Any) -> bool:
    """Whether a value is a tensor that has all its numbers, one after another."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    return not (value.is_meta or value.is_nested or value.is_quantized)
