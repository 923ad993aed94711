"""A small repository with recursive models of the same seams as the real ones, and adapters for it.

The adapters are the shipped ones, but for the versions that they know: those here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from deq_phantom_plugin.adapters.repos import (
    locuslab_eqr,
    samsung_trm,
    sapientinc_hrm,
    ubiquantai_urm,
)
from deq_phantom_plugin.patching.adapter import Adapter, SeamFile
from deq_phantom_plugin.patching.rewrite import fingerprint

RECURSIVE = Path(__file__).parent / "repositories" / "recursive"
MODELS = ("trm", "trm_singlez", "trm_hier6", "hrm", "urm", "eqr")


def _here(kind: SeamFile, root: Path) -> SeamFile:
    """Return a seam that knows the versions in a folder."""
    sources = [path.read_bytes() for path in sorted(root.rglob("*.py"))]
    sources = [s for s in sources if all(mark.encode() in s for mark in kind.marks)]
    known = {name: tuple(fingerprint(s, name) or "" for s in sources) for name in kind.known}
    return replace(kind, known=known)


def adapted(adapter: Adapter, root: Path) -> Adapter:
    """Return an adapter for the versions in a folder."""
    projects = tuple(
        replace(project, files=tuple(_here(kind, root) for kind in project.files))
        for project in adapter.projects
    )
    return replace(adapter, projects=projects)


ADAPTERS = [
    adapted(module.ADAPTER, RECURSIVE)
    for module in (locuslab_eqr, samsung_trm, sapientinc_hrm, ubiquantai_urm)
]
