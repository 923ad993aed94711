"""Counts what code uses besides time: evaluations of f, backward passes, bytes and launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from deq_phantom_plugin.diagnostics.measure.cost import _storages

MIB = 2**20


class Counted:
    """A map f that can count its evaluations and the backward passes through them.

    Args:
        func: f.

    Attributes:
        counting: whether it counts. This is False while times are taken.
        evaluations: the number of evaluations of f.
        backwards: the number of backward passes through an evaluation of f.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func
        self.counting = False
        self.evaluations = self.backwards = 0

    def __call__(self, *state: Any) -> Any:
        """Evaluate f."""
        if not self.counting:
            return self.func(*state)
        self.evaluations += 1
        leaves, structure = tree_flatten(self.func(*state))
        if not torch.is_grad_enabled():
            return tree_unflatten(leaves, structure)
        return tree_unflatten(list(_CountBackward.apply(self, *leaves)), structure)

    @contextmanager
    def count(self) -> Iterator[None]:
        """Count inside a `with` block, beginning at zero."""
        self.counting, self.evaluations, self.backwards = True, 0, 0
        try:
            yield
        finally:
            self.counting = False


class _CountBackward(torch.autograd.Function):
    """The identity; its backward pass counts."""

    @staticmethod
    def forward(ctx: Any, counted: Counted, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.counted = counted
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.counted.backwards += 1
        return (None, *grads)


def saved_bytes(run: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Return the largest number of bytes that autograd held for the backward pass at one time.

    The number is exact, and the same every time. A storage counts once, however often it is saved.

    Args:
        run: builds graphs, and differentiates them.
        known: tensors that exist in any case, such as parameters. They do not count.
    """
    ledger = _Ledger({storage.data_ptr() for storage in _storages(list(known))})
    with torch.autograd.graph.saved_tensors_hooks(ledger.hold, lambda held: held.tensor):
        run()
    return ledger.peak


class _Ledger:
    """Counts how many saved tensors hold each storage, and the bytes of all held storages."""

    def __init__(self, known: set[int]) -> None:
        self._known = known
        self._holders: dict[int, int] = {}
        self._now = self.peak = 0

    def hold(self, tensor: Tensor) -> _Held:
        # A sparse tensor has several storages.
        return _Held(self, tensor, [(s.data_ptr(), s.nbytes()) for s in _storages(tensor)])

    def add(self, key: int, size: int, holders: int) -> None:
        if key in self._known:
            return
        before = self._holders.get(key, 0)
        self._holders[key] = before + holders
        if before == 0 or before + holders == 0:
            self._now += size * holders
            self.peak = max(self.peak, self._now)


class _Held:
    """Stands for a saved tensor; it is deleted when autograd frees the graph."""

    def __init__(self, ledger: _Ledger, tensor: Tensor, places: list[tuple[int, int]]) -> None:
        self.tensor = tensor
        self._ledger, self._places = ledger, places
        for key, size in places:
            ledger.add(key, size, +1)

    def __del__(self) -> None:
        for key, size in self._places:
            self._ledger.add(key, size, -1)


# Names of the profiler's events. The last event moves a number from a tensor to Python, on any
# device. So synchronisations of host and device can be counted on a machine without a GPU.
_EVENTS = {
    "kernel_launches": (
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cuLaunchKernel",
        "cuLaunchKernelEx",
    ),
    "graph_launches": ("cudaGraphLaunch",),
    "syncs": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    "host_reads": ("aten::_local_scalar_dense",),
}


def profiled(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return how often `run` calls operators, launches kernels, and waits for the device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        run()  # the profiler itself synchronises at the end, which adds one for every contender
    counts = {event.key: event.count for event in profiler.key_averages()}
    found: dict[str, float] = {
        "operators": sum(n for name, n in counts.items() if name.startswith("aten::"))
    }
    for what, names in _EVENTS.items():
        found[what] = sum(counts.get(name, 0) for name in names)
    return found


# Operators that are dispatched and launch no kernel: views, allocations, queries of properties.
_NO_LAUNCH = """
    _local_scalar_dense _reshape_alias _unsafe_view alias as_strided detach diagonal empty
    empty_like empty_strided expand is_same_size lift_fresh narrow new_empty new_empty_strided
    permute promote_types resolve_conj select slice split split_with_sizes squeeze t transpose
    unbind unfold unsqueeze view view_as_complex view_as_real
"""

_READS = {"__bool__", "__float__", "__index__", "__int__", "cpu", "item", "numpy", "tolist"}


class _Dispatched(TorchDispatchMode):
    """Counts operators by name. An operator on a list of tensors counts once per tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.rpartition("::")[2]
        self.counts[name] += len(args[0]) if name.startswith("_foreach_") else 1
        return func(*args, **(kwargs or {}))


class _Read(TorchFunctionMode):
    """Counts how often numbers are moved from a tensor to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += getattr(func, "__name__", "") in _READS
        return func(*args, **(kwargs or {}))


def launches(run: Callable[[], Any]) -> dict[str, float]:
    """Return how many operators with a kernel `run` dispatches, and how often the host reads.

    The numbers are the same on every machine on which the code does the same. Operators inside a
    compiled region are not counted.
    """
    with _Dispatched() as dispatched, _Read() as read:
        run()
    none = set(_NO_LAUNCH.split())
    found = sum(n for name, n in dispatched.counts.items() if name not in none)
    return {"launches": found, "reads": read.count}
