"""Ask every external link of the built documentation whether it is there; needs a network.

    python docs/check_links.py site

Links inside the documentation, and their anchors, are checked by `mkdocs build --strict`.
"""

from __future__ import annotations

import html
import re
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def external_links(site: Path) -> list[str]:
    """Return the addresses that pages link to, sorted."""
    pages = (page.read_text() for page in site.rglob("*.html"))
    found = (re.findall(r'(?:href|src)="(https?://[^"#]+)', page) for page in pages)
    return sorted({html.unescape(link) for links in found for link in links})


def problem(link: str) -> str | None:
    """Return what is wrong with a link, None if nothing is."""
    request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0"})
    try:
        with urllib.request.urlopen(request, timeout=20):
            return None
    except (OSError, urllib.error.URLError) as error:
        return str(error)


def main(site: Path) -> int:
    """Print the links that are broken; return 1 if there are any."""
    links = external_links(site)
    with ThreadPoolExecutor(8) as pool:
        found = list(zip(links, pool.map(problem, links), strict=True))
    broken = [f"{link}: {wrong}" for link, wrong in found if wrong]
    print("\n".join([*broken, f"{len(links)} external links, {len(broken)} broken"]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
