"""The shipped adapters on checkouts of the repositories that they are for.

Each model is built by its own code, from its own smallest configuration, in a process of its own.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from conftest import DRIVERS, HOSTS
from deq_phantom_plugin.cli import main
from tiny_repository import tree

pytestmark = pytest.mark.hosts

ZOO = "torchdeq/deq-zoo"


@dataclass(frozen=True)
class Base:
    """A code base: its folder, and the packages that its own files import."""

    folder: str
    needs: tuple[str, ...] = ()

    @property
    def repository(self) -> str:
        return self.folder.partition("/")[0]


VISION = ("termcolor", "yacs")
BASES = {
    "deq_vision": Base("deq/MDEQ-Vision", (*VISION, "scipy")),
    "deq_sequence": Base("deq/DEQ-Sequence", ("termcolor", "scipy")),
    "mdeq": Base("mdeq", (*VISION, "scipy", "tqdm")),
    "phantom_cifar": Base("phantom_grad/MDEQ/MDEQ_CIFAR", (*VISION, "scipy", "tqdm")),
    "phantom_imagenet": Base("phantom_grad/MDEQ/MDEQ_ImageNet", ("termcolor", "scipy", "tqdm")),
    "ignn_node": Base("IGNN/nodeclassification", ("networkx", "sklearn")),
    "ignn_graph": Base("IGNN/graphclassification", ("networkx", "sklearn", "torch_geometric")),
    "zoo_mdeq_cifar": Base(f"{ZOO}/mdeq/mdeq_cifar", VISION),
    "zoo_mdeq_imagenet": Base(f"{ZOO}/mdeq/mdeq_imagenet", ("termcolor",)),
    "zoo_seq": Base(f"{ZOO}/deq-seq"),
    "zoo_lm": Base(f"{ZOO}/deq-lm"),
    "zoo_ignn_node": Base(f"{ZOO}/ignn/nodeclassification", ("networkx", "sklearn")),
    "zoo_ignn_graph": Base(
        f"{ZOO}/ignn/graphclassification", ("networkx", "sklearn", "torch_geometric")
    ),
    "zoo_flow": Base(f"{ZOO}/deq-flow", ("einops",)),
    "zoo_ddim": Base(f"{ZOO}/deq-ddim", ("yaml",)),
    "zoo_inr": Base(f"{ZOO}/deq-inr", ("plyfile", "skimage", "configargparse", "tqdm")),
}
SHIMS = "cpu,linalg,torch_sparse"


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory):
    """A copy of a repository's text files, made on demand and shared by the tests."""
    target = tmp_path_factory.mktemp("hosts")

    def copy(repository):
        root = target / repository
        if not root.exists():
            if not (HOSTS / repository).is_dir():
                pytest.skip(
                    f"no {HOSTS / repository}: put a checkout there, or set DEQ_PHANTOM_HOSTS"
                )
            shutil.copytree(HOSTS / repository, root, ignore=_unneeded)
        return root

    return copy


def _unneeded(folder, names):
    kept = (".py", ".yaml", ".yml", ".txt")
    return [
        name
        for name in names
        if name in (".git", "__pycache__")
        or (Path(folder, name).is_file() and not name.endswith(kept))
    ]


@pytest.fixture(params=sorted(BASES))
def base(request, checkouts):
    known = BASES[request.param]
    for package in known.needs:
        pytest.importorskip(package, reason=f"its own files import {package}")
    root = checkouts(known.repository)
    return request.param, root, root / Path(known.folder).relative_to(known.repository)


def train(name, folder, *args, prefix=()):
    """Run a driver; return what the harness says."""
    command = [*prefix, sys.executable, str(DRIVERS / "harness.py"), name, *map(str, args)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def switched(root, spec):
    """The command that runs another one with a repository's method switched."""
    run = [sys.executable, "-m", "deq_phantom_plugin.cli", "run", "--repo", str(root)]
    return [*run, "--grad", spec, "--compat", SHIMS, "--"]


@functools.cache
def own(name, folder):
    """What the code base's own method does."""
    return train(name, folder, "--own", "--steps", "2")


@pytest.mark.parametrize("grad", ["ift", "upg", "npg", "jfb"])
def test_ten_steps_of_training(base, grad):
    name, root, folder = base
    before = own(name, folder)
    result = train(name, folder, "--name", grad, prefix=switched(root, grad))
    assert len(result["losses"]) == 10
    assert all(abs(loss) < 1e3 for loss in result["losses"])
    assert result["finite"]
    assert set(before["grads"]) <= set(result["grads"])
    assert result["calls"] >= 10
    if name != "zoo_flow":  # untrained it has no equilibrium, and UPG's steps go elsewhere
        assert result["losses"][0] == pytest.approx(before["losses"][0], rel=2e-2)


def test_patched_on_disk_it_does_the_same(base, tmp_path, capsys):
    name, root, folder = base
    copy = tmp_path / "repository"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = tree(copy)
    assert main(["patch", str(copy), "--grad", "npg(k=3)", "--compat", SHIMS]) == 0
    patched = copy / folder.relative_to(root)
    if not name.startswith("zoo"):  # there the default is in the scripts' parser
        on_disk = train(name, patched, "--name", "npg", "--steps", "3")
        in_memory = train(
            name, folder, "--name", "npg", "--steps", "3", prefix=switched(root, "npg(k=3)")
        )
        assert on_disk["losses"] == pytest.approx(in_memory["losses"], rel=1e-5)
        assert on_disk["grads"] == in_memory["grads"]
        assert on_disk["calls"] >= 3
    for path in sorted(copy.rglob("*.py")):
        compile(path.read_bytes(), str(path), "exec")
    for path in sorted(copy.rglob("__pycache__")):
        shutil.rmtree(path)
    assert main(["patch", str(copy), "--revert"]) == 0
    assert tree(copy) == before


def gradients(name, folder, file, *args, prefix=()):
    train(name, folder, "--steps", "1", "--out", str(file), *args, prefix=prefix)
    return torch.load(file)


def relative_error(found, expected):
    assert set(found) == set(expected)
    difference = torch.cat([(found[k] - expected[k]).flatten() for k in expected])
    return difference.norm() / torch.cat([expected[k].flatten() for k in expected]).norm()


@pytest.mark.parametrize(
    ("base", "spec", "limit"),
    [
        ("phantom_cifar", "upg(k=5, lam=0.5)", 1e-5),
        ("phantom_imagenet", "upg(k=5, lam=0.5)", 1e-5),
        ("deq_vision", "ift(tol=1e-10, max_iter=300)", 1e-4),
        ("deq_sequence", "ift(tol=1e-10, max_iter=300)", 1e-4),
        ("mdeq", "ift(tol=1e-10, max_iter=300)", 1e-4),
        ("ignn_node", "ift(tol=1e-6, max_iter=300)", 1e-4),
        ("ignn_graph", "ift(tol=1e-6, max_iter=300)", 1e-4),
    ],
    indirect=["base"],
)
def test_the_repositorys_own_gradient(base, spec, limit, tmp_path):
    name, root, folder = base
    options = [] if name.startswith("ignn") else ["--double"]  # float32 is written into it
    expected = gradients(name, folder, tmp_path / "own.pt", "--own", *options)
    found = gradients(name, folder, tmp_path / "ours.pt", *options, prefix=switched(root, spec))
    assert relative_error(found, expected) < limit
    # Another method is another gradient: the comparison can tell.
    other = gradients(name, folder, tmp_path / "jfb.pt", *options, prefix=switched(root, "jfb"))
    assert relative_error(other, expected) > 10 * limit


@pytest.mark.parametrize("base", ["zoo_ignn_node", "zoo_ignn_graph", "zoo_ddim"], indirect=True)
def test_a_coupled_state_is_one_system(base, tmp_path):
    name, root, folder = base
    found, expected = (
        gradients(name, folder, tmp_path / f"{i}.pt", prefix=switched(root, spec))
        for i, spec in enumerate(["ift(tol=1e-6, max_iter=300)", "exact"])
    )
    assert relative_error(found, expected) < 1e-4


def test_doctor_knows_them(base, capsys):
    _, root, _ = base
    assert main(["doctor", str(root)]) == 0
    out = capsys.readouterr().out
    assert "not patched" in out
    assert "takes `" in out
