"""Nothing becomes more from one training step to the next, however the steps end."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from test_compile import HOSTED, SPECS, Hosted, OwnLoop
from torch.utils.checkpoint import checkpoint

import deq_phantom_plugin as dpp

ENDINGS = ["backward", "no backward", "an exception in backward"]
MODELS = [*((OwnLoop, spec) for spec in SPECS), *((Hosted, spec) for spec in HOSTED)]
each_model = pytest.mark.parametrize(
    ("make", "spec"), MODELS, ids=[f"{make.__name__}-{spec}" for make, spec in MODELS]
)
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def hooked():
    with dpp.enabled("torchdeq"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _what_pytorch_keeps():
    """Its checkpoint holds on to the first state it ever sees in a process, once."""
    x = torch.ones(1, requires_grad=True)
    checkpoint(torch.exp, x, use_reentrant=False).backward()


def live_tensors():
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


def resident():
    """Bytes of memory that the process holds."""
    try:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * PAGE
    except OSError:
        pytest.skip("no /proc/self/statm here")


class Training:
    """A training loop, whose steps end in these ways in turn."""

    def __init__(self, make, spec, *endings):
        self.model, self.endings, self.count = make(spec), endings, 0
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))

    def steps(self, n):
        for _ in range(n):
            ending = self.endings[self.count % len(self.endings)]
            self.count += 1
            dpp.set_step(self.model, self.count)
            self.optimizer.zero_grad()
            loss = self.model(self.x).sum()
            if ending == "an exception in backward":
                handle = self.model.inject.weight.register_hook(_fail)
                with pytest.raises(ZeroDivisionError):
                    loss.backward()
                handle.remove()
            elif ending == "backward":
                loss.backward()
                self.optimizer.step()


def _fail(grad):
    raise ZeroDivisionError


@pytest.mark.usefixtures("no_gc")
@each_model
def test_live_tensors_stay_as_many(make, spec):
    """Without the garbage collector, which would only hide a cycle for a while."""
    training = Training(make, spec, *ENDINGS)
    training.steps(6)
    before = live_tensors()
    training.steps(99)
    assert live_tensors() <= before


def test_a_leak_would_be_seen():
    training, kept = Training(OwnLoop, "upg", "backward"), []
    training.model.inner.register_forward_hook(lambda *args: kept.append(args[-1]))
    training.steps(1)
    before = live_tensors()
    training.steps(1)
    assert live_tensors() > before


@pytest.mark.slow
@each_model
def test_memory_is_flat_over_2000_steps(make, spec):
    training = Training(make, spec, *ENDINGS)
    training.steps(501)  # allocators and caches have filled by then
    gc.collect()
    tensors, grown = live_tensors(), []
    # A tensor kept in each step would be 500 bytes at the least, of which 2,000 are a megabyte. An
    # allocator takes a megabyte once, a leak in every window.
    while len(grown) < 2 and not any(growth < 2**19 for growth in grown):
        memory = resident()
        training.steps(2001)  # as often in each way
        gc.collect()
        grown.append(resident() - memory)
        assert live_tensors() <= tensors
    assert min(grown) < 2**19
