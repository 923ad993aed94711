"""What all tests share: a seed, no host left enabled, and equilibria drawn at random."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import deq_phantom_plugin as dpp
from deq_phantom_plugin.strategies import registry
from deq_phantom_plugin.testing import NESTINGS, Contraction, make_equilibrium

ROOT = Path(__file__).parents[1]
DRIVERS = ROOT / "tests" / "drivers"
"""Programs that tests run in processes of their own."""
HOSTS = Path(os.environ.get("DEQ_PHANTOM_HOSTS", ROOT / ".hosts"))
"""Checkouts of foreign repositories."""

# Everything here is small, and tests run side by side.
torch.set_num_threads(int(os.environ.get("DEQ_PHANTOM_TEST_THREADS", "1")))

settings.register_profile(
    "default",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")


def load_example(name: str) -> Any:
    """Return examples/<name>.py as a module."""
    path = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def evaluate(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return what a model says in evaluation mode, where no gradient is wanted."""
    with torch.no_grad():
        return model.eval()(*args, **kwargs)


@pytest.fixture(autouse=True)
def _isolated():
    """Every test starts from the same seed, and leaves no host enabled and no strategy behind."""
    torch.manual_seed(0)
    registered = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(registered)
    dpp.disable()


@st.composite
def equilibria(draw: st.DrawFn, coupled: bool | None = None) -> tuple[Contraction, dpp.Context]:
    """Maps, shapes and nestings at random, with the context that fits."""
    _, n_leaves, nest = draw(st.sampled_from(NESTINGS))
    batch = draw(st.integers(1, 3))
    rest = st.lists(st.integers(1, 3), min_size=0, max_size=3).map(tuple)
    shapes = [(batch, *draw(rest)) for _ in range(n_leaves)]
    mixed = draw(st.booleans()) if coupled is None else coupled
    equilibrium = make_equilibrium(
        shapes,
        nest,
        seed=draw(st.integers(0, 2**31)),
        norm=draw(st.floats(0.1, 0.9)),
        coupled=mixed,
    )
    return equilibrium, dpp.Context(batch_dim=None if mixed else 0)


@pytest.fixture
def no_gc():
    """Switch the cyclic garbage collector off, so that only reference counts free memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
