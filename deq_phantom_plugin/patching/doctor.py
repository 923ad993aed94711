"""Writes the reports of `deq-phantom doctor`.

`diagnose` lists the versions of the packages, the hosts, the strategies, and the state of a
patched repository. It also says what is broken or missing, and how to install it. `issue_report`
adds what a report of a wrong gradient needs.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution, entry_points, version
from pathlib import Path

import torch

from .._plumbing import entry_points as groups
from .._plumbing.extras import extras, is_there, pip_line, why_not
from ..diagnostics.self_check import self_check
from ..hosts import broken_hosts, host_names, host_versions
from ..strategies.registry import list_strategies, strategy_class
from .patch import check_committed, status
from .repository import Match, check_root, check_unpatched, outside_links, plan, recognise

# The modules to import of packages whose module has another name.
_MODULES = {
    "pillow": "PIL.Image",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "transformers": "transformers.modeling_utils",
}
# Extras for developers of this package. Their packages are not reported as missing.
_DEVELOPERS = ("docs", "test")
# Environment variables that can change the numbers which the same code computes.
_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_CBWR",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OPENBLAS_CORETYPE",
    "TORCHDYNAMO_DISABLE",
)


def diagnose(root: Path | None = None) -> str:
    """Return a report of this installation, and of a repository if one is given.

    Args:
        root: the folder of the repository, or None.

    Raises:
        ValueError: if `root` is not a folder.
    """
    # The metadata of a wheel may lack the local part of PyTorch's version, such as +cu130.
    lines = [
        f"python            {platform.python_version()}  {sys.executable}",
        f"{'deq-phantom-plugin':17} {version('deq-phantom-plugin')}",
        f"{'torch':17} {torch.__version__}, {_build()}",
    ]
    unusable: dict[str, None] = {}  # a dict as an ordered set: each reason is printed once
    packages = _packages()
    for name, number in packages.items():
        why = "" if number is None else _why_broken(name)
        lines.append(f"{name:17} {number or 'missing'}{', broken' if why else ''}")
        if why:
            unusable[why] = None
    lines += _extras()
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
    lines += [
        f"missing: {name}: {pip_line(_smallest(name))}"
        for name, number in packages.items()
        if number is None
    ]
    return "\n".join(lines)


def issue_report(root: Path | None = None) -> str:
    """Return the text that an issue about a wrong gradient needs.

    It has what `diagnose` says, the machine, the settings that change numbers, and a comparison of
    gradients with their closed form. The path of the user's home folder is replaced by `~`.

    Args:
        root: the folder of the repository, or None.

    Raises:
        ValueError: if `root` is not a folder.
    """
    settings = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    lines = [
        diagnose(root),
        f"machine           {platform.platform()}, {platform.machine()}",
        f"CPU capability    {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads",
        f"float32 products  {torch.get_float32_matmul_precision()}",
        f"environment       {', '.join(f'{k}={v}' for k, v in settings.items()) or 'nothing set'}",
        "gradients of a linear map in float64, against their closed form",
        *(f"  {check}" for check in self_check()),
    ]
    return "\n".join(lines).replace(str(Path.home()), "~")


def _build() -> str:
    """Return in words what PyTorch was built for, and the GPUs that it sees."""
    for kind, name in (("cuda", "CUDA"), ("hip", "ROCm"), ("xpu", "XPU")):
        if number := getattr(torch.version, kind, None):
            of_kind = torch.xpu if kind == "xpu" else torch.cuda
            names = [of_kind.get_device_name(i) for i in range(of_kind.device_count())]
            return f"{name} {number} build, {', '.join(names) or 'but it sees no GPU'}"
    return "CPU build"


def _packages() -> dict[str, str | None]:
    """Return the version of each package in the users' extras, None if it is not installed."""
    names = {
        name for extra, names in extras().items() if extra not in _DEVELOPERS for name in names
    }
    return {name: _version(name) for name in sorted(names)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _why_broken(name: str) -> str:
    """Return why an installed package cannot be imported, or an empty string if it can be."""
    module = _MODULES.get(name, name.replace("-", "_"))
    return why_not(module) if is_there(module.partition(".")[0]) else ""


def _smallest(name: str) -> str:
    """Return the smallest extra that contains this package."""
    return min((len(names), extra) for extra, names in extras().items() if name in names)[1]


def _extras() -> list[str]:
    lines = ["extras"]
    for extra, names in extras().items():
        lacking = [name for name in names if _version(name) is None]
        lines.append(f"  {extra:15} {'lacks ' + ', '.join(lacking) if lacking else 'complete'}")
    return lines


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
    """Return the reasons for which `patch` would refuse this repository."""
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
