"""Our MDEQ against the deq-zoo's, and the presets against the official files."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from conftest import HOSTS

pytest.importorskip("torchdeq")

from deq_phantom_plugin.adapters.mdeq import MDEQ, PRESETS, MDEQConfig

pytestmark = pytest.mark.hosts

ZOO = HOSTS / "torchdeq/deq-zoo/mdeq/mdeq_cifar"
OFFICIAL = {
    "tiny": "cifar/cls_mdeq_TINY.yaml",
    "small": "imagenet/cls_mdeq_SMALL.yaml",
    "large": "cifar/cls_mdeq_LARGE.yaml",
    "xl": "imagenet/cls_mdeq_XL.yaml",
}
SHRUNKEN = MDEQConfig((16, 16, 24, 32), (4, 4, 6, 8), 40, f_max_iter=10, groups=8, expansion=2)
SOLVER = {"f_solver": "broyden", "f_tol": 1e-3, "f_stop_mode": "rel"}


def host_file(path: Path) -> Path:
    if not path.is_file():
        pytest.skip(f"no {path}: put a checkout there, or set DEQ_PHANTOM_HOSTS")
    return path


def read_numbers(path):
    """Read a yaml file's scalars and lists by their keys, which are unique where we look."""
    found, key = {}, ""
    for line in host_file(path).read_text().splitlines():
        if item := re.match(r"\s*-\s*(\d+)\s*$", line):
            found.setdefault(key, []).append(int(item[1]))
        elif pair := re.match(r"\s*(\w+):\s*(\S*)", line):
            key = pair[1]
            if pair[2]:
                found.setdefault(key, pair[2])
    return found


def config_from(numbers, f_max_iter):
    return MDEQConfig(
        channels=tuple(numbers["NUM_CHANNELS"]),
        head_channels=tuple(numbers["HEAD_CHANNELS"]),
        final_channels=int(numbers["FINAL_CHANSIZE"]),
        f_max_iter=f_max_iter,
        groups=int(numbers["NUM_GROUPS"]),
        expansion=int(numbers["EXPANSION_FACTOR"]),
        blocks=tuple(numbers["NUM_BLOCKS"]),
        downsample_times=int(numbers["DOWNSAMPLE_TIMES"]),
    )


def zoo_config(config):
    stage = {
        "NUM_MODULES": 1,
        "NUM_BRANCHES": len(config.channels),
        "BLOCK": "BASIC",
        "HEAD_CHANNELS": list(config.head_channels),
        "FINAL_CHANSIZE": config.final_channels,
        "NUM_BLOCKS": list(config.blocks),
        "NUM_CHANNELS": list(config.channels),
        "FUSE_METHOD": "SUM",
    }
    model = {
        "NUM_LAYERS": 1,
        "NUM_CLASSES": 10,
        "NUM_GROUPS": config.groups,
        "DOWNSAMPLE_TIMES": config.downsample_times,
        "EXPANSION_FACTOR": config.expansion,
        "EXTRA": {"FULL_STAGE": stage},
    }
    return {"MODEL": model}


@pytest.fixture
def zoo():
    pytest.importorskip("termcolor", reason="the deq-zoo's MDEQ imports termcolor")
    path = host_file(ZOO / "mdeq/models/mdeq.py")
    spec = importlib.util.spec_from_file_location("deq_zoo_mdeq", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # the deq-zoo makes its zeros in the default dtype
    yield
    torch.set_default_dtype(torch.float32)


def own_tensors(model):
    """Return the modules that hold parameters or buffers: both models register them in order."""
    return [
        m
        for m in model.modules()
        if any(True for _ in m.parameters(recurse=False))
        or any(True for _ in m.buffers(recurse=False))
    ]


def copy_weights(source, target):
    theirs, ours = own_tensors(source), own_tensors(target)
    assert len(theirs) == len(ours)
    with torch.no_grad():
        for a, b in zip(theirs, ours, strict=True):
            for parameter in a.parameters(recurse=False):
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
                if parameter.ndim == 1:  # biases begin at 0 and scales at 1
                    parameter.add_(0.1 * torch.randn_like(parameter))
            if not hasattr(a, "weight_g"):
                assert type(a) is type(b)
            b.load_state_dict(a.state_dict(), strict=True)
    return list(zip(theirs, ours, strict=True))


def assert_same_gradients(pairs):
    total = torch.stack([p.grad.norm() for a, _ in pairs for p in grads(a)]).norm()
    for a, b in pairs:
        for p, q in zip(grads(a), grads(b), strict=True):
            # A bias before BatchNorm has gradient 0, but for rounding: hence the floor.
            error = (p.grad - q.grad).norm() / p.grad.norm().clamp_min(1e-6 * total)
            assert error < 1e-8, (a, tuple(p.shape))


def grads(module):
    return [p for p in module.parameters(recurse=False) if p.grad is not None]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_official_files(name):
    numbers = read_numbers(HOSTS / "mdeq/experiments" / OFFICIAL[name])
    assert numbers["WNORM"] == "true"
    assert config_from(numbers, int(numbers["F_THRES"])) == PRESETS[name]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [5, "upg(k=5, lam=0.5)"])
@pytest.mark.parametrize(
    "config",
    [None, SHRUNKEN, replace(SHRUNKEN, downsample_times=2, blocks=(2, 1, 1, 1))],
    ids=["small.yaml", "four branches", "downsampled, more blocks"],
)
def test_agrees_with_the_deq_zoo(zoo, config, grad, training):
    if config is None:
        config = config_from(read_numbers(ZOO / "configs/small.yaml"), f_max_iter=22)
        assert config == PRESETS["tiny"]
    args = {**SOLVER, "f_max_iter": config.f_max_iter, "grad": 5, "tau": 0.5}
    theirs = zoo.get_cls_net(zoo_config(config), {**args, "norm_type": "weight_norm"})
    ours = MDEQ(config, **({"grad": grad, "tau": 0.5} if grad == 5 else {"grad": grad}))
    pairs = copy_weights(theirs, ours)
    theirs.train(training)
    ours.train(training)
    side = 2 * config.size_divisor
    x, labels = torch.randn(4, 3, side, side), torch.arange(4)
    expected = theirs(x)
    expected = expected[-1] if training else expected
    said = pytest.warns(dpp.AssumptionWarning, match="in evaluation mode")
    with contextlib.nullcontext() if training else said:
        found = ours(x)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    F.cross_entropy(expected, labels).backward()
    F.cross_entropy(found, labels).backward()
    assert_same_gradients(pairs)
    assert isinstance(ours.stem[0][1], nn.BatchNorm2d)
    torch.testing.assert_close(ours.stem[0][1].running_var, theirs.downsample[1].running_var)
