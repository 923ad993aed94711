"""Makes this package importable from the checkout, without pip and without a network.

    export PYTHONPATH=$(python benchmarks/importable.py FOLDER)

The script fills FOLDER as an installation would. It links the package with `adapters/` inside it to
the checkout, and writes the metadata from which entry points are read. It prints the folder.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lay_out(folder: Path) -> None:
    """Fill an empty folder with links to the package, and with its metadata."""
    package = folder / "deq_phantom_plugin"
    package.mkdir(parents=True)
    for source in (ROOT / "deq_phantom_plugin").iterdir():
        (package / source.name).symlink_to(source)
    (package / "adapters").symlink_to(ROOT / "adapters")
    project = (ROOT / "pyproject.toml").read_text()
    # Python has tomllib only from 3.11 on, and only two kinds of lines are needed.
    version = re.search(r'^version = "(.+)"', project, re.MULTILINE)
    assert version is not None, "pyproject.toml has no version"
    info = folder / f"deq_phantom_plugin-{version[1]}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: deq-phantom-plugin\nVersion: {version[1]}\n"
    )
    groups = re.findall(r'^\[project\.entry-points\."(.+)"\]\n((?:.+\n)+)', project, re.MULTILINE)
    (info / "entry_points.txt").write_text(
        "\n".join(f"[{group}]\n" + points.replace('"', "") for group, points in groups)
    )


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
    print(Path(sys.argv[1]).resolve())
