"""A small repository with the same kind of seam as the real ones, and an adapter for it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from deq_phantom_plugin.adapters.repos import GRAD_OPTION
from deq_phantom_plugin.patching.adapter import Adapter, Edit, Project, SeamFile
from deq_phantom_plugin.patching.rewrite import fingerprint

TINY = Path(__file__).parent / "repositories" / "tiny"

SEAM = SeamFile(
    "the layer",
    ("class Net", "backward_hook"),
    (
        Edit(
            "self.hook = None",
            "self.equilibrium = deq_phantom_plugin.patching.Equilibrium({grad})",
            scope="Net.__init__",
        ),
        Edit(
            "z.requires_grad_()",
            "new_z = self.equilibrium(func, z)",
            "replace",
            through="self.hook = new_z.register_hook",
            scope="Net.forward",
        ),
    ),
    {"Net.forward": (fingerprint((TINY / "model.py").read_bytes(), "Net.forward"),)},
)
SCRIPT = SeamFile(
    "the training script",
    ("from model import Net", "parse_args()"),
    (
        GRAD_OPTION,
        Edit(
            "model = Net()",
            "deq_phantom_plugin.patching.switch(model, args.grad)",
            scope="gradient",
        ),
    ),
    required=False,
)
ADAPTER = Adapter(
    "somebody/tiny",
    ("0" * 40,),
    (Project("somebody/tiny", "`--grad ...`", (SEAM, SCRIPT)),),
)


def checkout(folder: Path, git: bool = True, source: Path = TINY) -> Path:
    """Return a fresh copy of the repository."""
    root = folder / source.name
    shutil.copytree(source, root, ignore=shutil.ignore_patterns("__pycache__"))
    if git:
        for command in (
            ["init", "-q"],
            ["add", "-A"],
            ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "first"],
        ):
            subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


def tree(root: Path) -> dict[str, bytes]:
    """Return all files but git's, with their bytes."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".git" not in path.relative_to(root).parts
    }
