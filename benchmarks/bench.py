"""Compares this package with TorchDEQ, silva-networks and hand-written loops (floors).

    python benchmarks/bench.py [--only GROUP ...] [--out benchmarks/results/cpu-DATE.json]

All of them run in one process and take turns. The script writes JSON and a Markdown table beside
it, and prints the table. Rows of packages that are not installed say "not available".
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import os
import platform
import sys
import time
import warnings
from pathlib import Path

import torch
from suite import contest
from suite.data import load_images
from suite.report import Results

import deq_phantom_plugin as dpp

GROUPS = ("backward", "forward", "step", "ift", "ignn", "memory", "overhead", "synthetic")
GROUPS += ("scaling", "warm", "device", "silva", "small", "launches", "compiled", "precision")


def environment(args: argparse.Namespace, settings: contest.Settings) -> dict[str, object]:
    """Return the hardware, the versions and the settings, on which the numbers depend."""
    gpu = None
    if settings.device.type == "cuda":
        gpu = torch.cuda.get_device_name(settings.device)
    versions = {}
    for package in ("torchdeq", "silva-networks", "transformers", "torch-geometric", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": str(settings.device),
        "gpu": gpu,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load average at start": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "repeats": settings.repeats,
        "quick": settings.quick,
        "images": load_images(settings.images).name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deq-phantom-plugin": dpp.__version__,
        **versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.is_file() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def _file_name(about: dict[str, object]) -> str:
    """Return the name of the results, DEVICE-DATE.json or DEVICE-silva-DATE.json.

    silva-networks has an environment of its own, with other versions of the packages.
    """
    device = str(about["gpu"] or "cpu").replace(" ", "-").lower()
    silva = "" if about["silva-networks"] == "not installed" else "-silva"
    return f"{device}{silva}-{datetime.date.today().isoformat()}.json"


def main(argv: list[str] | None = None) -> None:
    """Run the groups that the command line selects."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP")
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/DEVICE-DATE")
    parser.add_argument("--repeats", type=int, default=11, help="rounds of each contest")
    parser.add_argument(
        "--work", default="", metavar="TEXT", help="only work that has it in its name"
    )
    parser.add_argument("--threads", type=int, help="of PyTorch; its own default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the suite itself")
    parser.add_argument("--images", type=Path, help=".npz of JPEGs; else scikit-learn's digits")
    parser.add_argument("--graphs", type=Path, help="root of PyG's data sets, for group ignn")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--cache", type=Path, default=Path("runs/bench"), help="trained weights")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    # Many solves stop early on purpose here, so this warning would say nothing new.
    warnings.filterwarnings("ignore", category=dpp.ConvergenceWarning)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
    settings = contest.Settings(
        device=args.device,
        dtype=getattr(torch, args.dtype),
        repeats=min(args.repeats, 2) if args.quick else args.repeats,
        quick=args.quick,
        images=args.images,
        graphs=args.graphs,
        cache=args.cache,
    )
    results = Results(environment(args, settings))
    out = args.out or Path(__file__).parent / "results" / _file_name(results.environment)
    start = time.monotonic()
    for name in args.only:
        group = importlib.import_module(f"suite.groups.{name}")
        try:
            for item in group.contests(settings):
                if args.work in item.work:
                    contest.hold(item, settings, results)
                    # Written after each contest, so that a run that is stopped leaves results.
                    results.environment["minutes"] = round((time.monotonic() - start) / 60, 1)
                    results.write(out)
        except contest.Unavailable as reason:
            results.notes.append(f"Group `{name}` or the rest of it: not available: {reason}.")
    results.write(out)
    print(results.markdown())
    print(f"written: {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
