"""What is installed, hooked and patched, and what is missing."""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution, entry_points, version
from pathlib import Path

import torch

from .._plumbing import entry_points as groups
from .._plumbing.extras import why_not
from ..hosts import broken_hosts, host_names, host_versions
from ..strategies.registry import list_strategies, strategy_class
from .patch import check_committed, status
from .repository import Match, check_root, check_unpatched, outside_links, plan, recognise

# The module to import, and what to install where it is missing.
_PACKAGES = {
    "torch": ("torch", "torch"),
    "torchdeq": ("torchdeq", '"deq-phantom-plugin[torchdeq]"'),
    "torch-geometric": ("torch_geometric", '"deq-phantom-plugin[graph]"'),
    "transformers": ("transformers.modeling_utils", '"deq-phantom-plugin[text]"'),
    "libcst": ("libcst", '"deq-phantom-plugin[patch]"'),
}


def diagnose(root: Path | None = None) -> str:
    """Return a report of this installation, and of a repository if one is given.

    Raises:
        ValueError: if the repository is no folder.
    """
    lines = [f"python            {platform.python_version()}  {sys.executable}"]
    lines.append(f"{'deq-phantom-plugin':17} {version('deq-phantom-plugin')}")
    missing: list[str] = []
    unusable: dict[str, None] = {}  # the reasons, each once
    for name, (module, pip) in _PACKAGES.items():
        try:
            # The metadata of a wheel may lack the local part of PyTorch's version, such as +cu130.
            number = torch.__version__ if name == "torch" else version(name)
        except PackageNotFoundError:
            lines.append(f"{name:17} missing")
            missing.append(f"{name}: pip install {pip}")
            continue
        why = why_not(module)
        lines.append(f"{name:17} {number}{', broken' if why else ''}")
        if why:
            unusable[why] = None
    with warnings.catch_warnings(record=True) as broken:
        warnings.simplefilter("always")
        lines.append(f"hosts             {', '.join(host_names()) or 'none'}")
        broken_ones = broken_hosts()
        unusable.update(dict.fromkeys(broken_ones.values()))
        for name, (number, known) in host_versions().items():
            note = "" if known else ", unknown to this package: off"
            lines.append(f"  {name:15} {number}{', broken' if name in broken_ones else note}")
        lines.append("strategies")
        for name in list_strategies():
            lines.append(f"  {name:15} {_origin(name)}")
        if root is not None:
            lines += _repository(check_root(root))
    lines += [f"warning: {warning.message}" for warning in broken]
    lines += [f"broken: {line}" for line in unusable]
    lines += [f"missing: {line}" for line in missing]
    return "\n".join(lines)


def _origin(name: str) -> str:
    cls = strategy_class(name)
    for point in entry_points(group=groups.STRATEGIES):
        if point.name == name and point.dist is not None:
            return f"{point.value} of {point.dist.name} {distribution(point.dist.name).version}"
    return (
        "built in"
        if cls.__module__.startswith(f"{__package__.split('.')[0]}.")
        else (f"registered by {cls.__module__}")
    )


def _obstacles(root: Path, matches: Sequence[Match]) -> list[str]:
    """Return what `patch` would refuse."""
    try:
        check_unpatched(root)
        if not matches:
            return ["  not recognised"]
        _, changes = plan(root, "jfb", "patch")
        check_committed(root, [change.path for change in changes])
    except ValueError as error:
        return [f"  {line}" for line in str(error).splitlines()]
    except ImportError as error:
        return [f"  cannot say whether its version is known: {error}"]
    return [f"  a link out of the folder, passed over: {path}" for path in outside_links(root)]


def _repository(root: Path) -> list[str]:
    lines = [f"repository        {root}"]
    try:
        patched = status(root)
        matches = recognise(root, patched.original(root) if patched else None)
    except ValueError as error:
        return [*lines, f"  {error}"]
    for match in matches:
        commits = ", ".join(commit[:7] for commit in match.adapter.commits)
        lines.append(f"  {match.project.name} (known: {commits}); takes {match.project.switch}")
        lines += [f"    {path}: {kind.what}" for path, kind in match.files.items()]
    if patched is None:
        lines += _obstacles(root, matches)
        lines.append("  not patched")
    else:
        shims = f", shims {', '.join(patched.compat)}" if patched.compat else ""
        lines.append(f"  patched with {patched.grad}{shims}")
        changed = patched.changed(root)
        if changed:
            lines.append(f"  changed since: {', '.join(changed)}")
    return lines
