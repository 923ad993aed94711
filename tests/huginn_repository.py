"""A small repository with recurrent models of the same seams as the real one, and its adapter.

The adapter is the shipped one, but for the versions that it knows: those here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from deq_phantom_plugin.adapters.repos import seal_rg_recurrent_pretraining
from deq_phantom_plugin.patching.adapter import SeamFile
from deq_phantom_plugin.patching.rewrite import fingerprint

RECURRENT = Path(__file__).parent / "repositories" / "huginn"


def _here(kind: SeamFile) -> SeamFile:
    """Return a seam that knows the versions here."""
    sources = [path.read_bytes() for path in sorted(RECURRENT.rglob("*.py"))]
    sources = [s for s in sources if all(mark.encode() in s for mark in kind.marks)]
    known = {name: tuple(fingerprint(s, name) or "" for s in sources) for name in kind.known}
    return replace(kind, known=known)


ADAPTER = replace(
    seal_rg_recurrent_pretraining.ADAPTER,
    projects=tuple(
        replace(project, files=tuple(_here(kind) for kind in project.files))
        for project in seal_rg_recurrent_pretraining.ADAPTER.projects
    ),
)
