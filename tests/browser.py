"""A headless Chromium, for the test that looks at MLflow's page and for the pictures of the documentation."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.pipeline.clones import Clone, closed_port

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    """The path of a browser, None if there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def dom(browser: str, address: str, width: int = 2400) -> str:
    """A page's HTML after two minutes of the page's own time, which pass as fast as the browser can compute."""
    return _run(browser, "--dump-dom", address, width=width, height=1000)


def picture(browser: str, address: str, path: Path, width: int, height: int) -> None:
    """Writes a picture of the page, as PNG."""
    _run(browser, f"--screenshot={path}", address, width=width, height=height)


def _run(browser: str, do: str, address: str, width: int, height: int) -> str:
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    with tempfile.TemporaryDirectory() as profile:
        options += [f"--user-data-dir={profile}", "--virtual-time-budget=120000", f"--window-size={width},{height}"]
        done = subprocess.run([browser, *options, do, address], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@contextmanager
def mlflow_page(clone: Clone) -> Iterator[str]:
    """Runs `make ui`'s command in a folder with runs; gives the address that it prints."""
    command = f"python -m tools ui --port {closed_port()}"
    page = clone.start(command, DISPLAY="", WAYLAND_DISPLAY="", PYTHONPATH=str(REPOSITORY))
    try:
        printed = ""
        while "startup complete" not in printed:
            printed += (line := page.stdout.readline())
            assert line, printed
        yield next(word for word in printed.split() if "/#/experiments/" in word)
    finally:
        os.killpg(page.pid, signal.SIGTERM)  # the server has processes of its own
        page.wait()
