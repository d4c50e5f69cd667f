"""Say which Chromium the browser tests will drive, or what to install; exit status 1 where there is none.

python scripts/chromium.py
"""

import shutil
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--no-sandbox",  # a container's root may not have one
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
REMEDY = (
    "test-browser: no Chromium was found (looked for "
    + ", ".join(NAMES)
    + " on PATH, and for playwright's own); on Debian `apt install chromium` brings one, elsewhere "
    "`.venv/bin/python -m playwright install --with-deps chromium`."
)


def find() -> str | None:
    """The path of the system's Chromium, else of the one that playwright has installed, else None."""
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as driver:
        own = driver.chromium.executable_path
    return own if Path(own).is_file() else None


def main() -> int:
    found = find()
    print(f"test-browser: {found}" if found else REMEDY, file=sys.stdout if found else sys.stderr)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
