"""A picture of the dashboard while a fleet runs, as a browser shows it.

    python benchmarks/fleet_page.py docs/dashboard.png

Runs ``emutune fleet demo`` in a directory that is thrown away. Needs Chromium, of the system or named by CHROMIUM,
and the package playwright, which drives it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

COMMAND = Path(sys.executable).with_name("emutune")
FLEET = [COMMAND, "fleet", "demo", "--policy", "random", "--devices", "6"]
WAIT_MS = 180_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    arguments = parser.parse_args()
    browser = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    if browser is None:
        sys.exit("no Chromium is installed (on Debian: apt-get install chromium); CHROMIUM may name one")
    with (
        tempfile.TemporaryDirectory() as directory,
        subprocess.Popen(FLEET, cwd=directory, stdout=subprocess.PIPE, text=True) as fleet,
        sync_playwright() as driver,
    ):
        assert fleet.stdout is not None
        said = next(line for line in fleet.stdout if line.startswith("dashboard:"))
        url, key = re.fullmatch(r"dashboard: (\S+), its key is in (.+)\n", said).groups()
        # No sandbox, so that it runs as root inside of a container; the authority is the fleet's own.
        opened = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_context(
            ignore_https_errors=True,
            color_scheme=arguments.scheme,
            viewport={"width": arguments.width, "height": 1370},
        ).new_page()
        page.goto(f"{url}#key={(Path(directory) / key).read_text().strip()}")
        expect(page.locator("#state")).to_have_text(re.compile("4 of 5 steps are done"), timeout=WAIT_MS)
        page.screenshot(path=arguments.picture)
        opened.close()
        fleet.communicate()


if __name__ == "__main__":
    main()
