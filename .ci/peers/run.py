"""Run the test suites of other projects with this package at work.

    python .ci/peers/run.py transformers|deepinv|silva [ARGUMENT OF PYTEST ...]

Run it with the Python that has the project installed; `make test-peers` does so for all. Nothing of
the suites is part of this repository: they come with the packages, or from checkouts in .hosts/, or
in the folder that DEQ_PHANTOM_HOSTS names. The last line is the suite's row in
docs/compatibility.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOSTS = Path(os.environ.get("DEQ_PHANTOM_HOSTS", HERE.parents[1] / ".hosts")).resolve()


@dataclass(frozen=True)
class Suite:
    """The tests of another project.

    Attributes:
        distribution: the project's name.
        needs: modules that have to be importable.
        install: how to get them.
        tests: what pytest is given.
        folder: where it runs.
        clone: how to get the folder, with {version} for the installed one; empty if it comes with
            the package.
        host: what to enable: then the suite runs without it and with it. Empty for one run.
    """

    distribution: str
    needs: tuple[str, ...]
    install: str
    tests: tuple[str, ...]
    folder: Path
    clone: str = ""
    host: str = ""

    def missing(self) -> str:
        """Return what is missing and how to get it, empty if nothing is."""
        absent = [name for name in self.needs if find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} not installed: {self.install}"
        if not (self.folder / "tests").is_dir() and self.clone:
            clone = self.clone.format(version=self.version())
            return f"no tests in {self.folder}: {clone} {self.folder}"
        return ""

    def version(self) -> str:
        """Return the installed version."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return "not installed"

    def run(self, host: str, arguments: list[str]) -> dict[str, str]:
        """Run the suite with a host enabled, or none, and return how each test ended."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "outcomes"
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
                "DEQ_PHANTOM_PEERS_HOST": host,
                "DEQ_PHANTOM_PEERS_FILE": str(file),
            }
            # Settings of ours, such as warnings that are errors, are not for tests of others.
            own = ["-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "-p", "outcomes"]
            command = [sys.executable, "-m", "pytest", "-q", *own, *self.tests, *arguments]
            subprocess.run(command, cwd=self.folder, env=environment, check=False)
            if not file.is_file():
                sys.exit(f"{self.distribution}: pytest ended early")
            outcomes: dict[str, str] = json.loads(file.read_text())
        return outcomes


def installed(package: str) -> Path:
    """Return the folder of an installed package, which need not be importable."""
    spec = find_spec(package)
    return Path("missing" if spec is None or spec.origin is None else spec.origin).parent


SUITES = {
    "transformers": Suite(
        "transformers",
        ("transformers", "torchdeq", "accelerate", "parameterized", "httpx", "psutil"),
        "make .venv-transformers/.installed",
        (str(HERE / "test_transformers.py"),),
        HOSTS / "transformers",
        "git clone --depth 1 --branch v{version} https://github.com/huggingface/transformers",
    ),
    "deepinv": Suite(
        "deepinv",
        ("deepinv", "torchvision"),
        "make .venv-deepinv/.installed",
        ("test_unfolded.py", "test_optim.py"),
        installed("deepinv") / "tests",
        host="deepinv",
    ),
    "silva": Suite(
        "silva-networks",
        ("silva_networks",),
        "make .venv-silva/.installed",
        ("tests",),
        HOSTS / "silva-networks",
        "git clone --branch v{version} https://github.com/jseluis/silva-networks",
        host="silva",
    ),
}


def main(name: str, *arguments: str) -> int:
    """Run one suite; return an exit status, 0 also for a suite that is not there."""
    suite = SUITES[name]
    if missing := suite.missing():
        print(f"{name}: left out. {missing}")
        return 0
    outcomes = suite.run(suite.host, [*arguments])
    changed: list[str] = []
    if suite.host:
        without = suite.run("", [*arguments])
        changed = [test for test in without | outcomes if without.get(test) != outcomes.get(test)]
        for test in changed:
            print(f"{test}: {without.get(test)} without the host, {outcomes.get(test)} with it")
    count = Counter(outcomes.values())
    for test in (test for test, outcome in outcomes.items() if outcome == "xpassed"):
        print(f"{test} passes: take it out of what does not apply")
    numbers = (count[outcome] for outcome in ("passed", "failed", "xfailed", "skipped"))
    same = ("differs" if changed else "the same") if suite.host else ""
    row = [suite.distribution, suite.version(), len(outcomes), *numbers, same]
    print("suite | version | tests | passed | failed | do not apply | skipped | without the host")
    print("| " + " | ".join(map(str, row)) + " |")
    # Where the project's own tests fail without the host, they may fail with it.
    wrong = changed or count["xpassed"] or (count["failed"] and not suite.host)
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in SUITES:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(SUITES)} [ARGUMENT OF PYTEST ...]")
    sys.exit(main(*sys.argv[1:]))
