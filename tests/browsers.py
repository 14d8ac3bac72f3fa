"""A headless Chromium for tests of pages, and a page that keeps what it asked for and what went wrong."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Playwright's browser; the test skips where there is no Chromium or no Playwright. Its loop runs in this thread, so not for longer."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@contextmanager
def opened_on_a_phone(browser: Any, address: str) -> Iterator[SimpleNamespace]:
    """``page``, what it asked for (``requests``) and what went wrong (``faults``: errors, what its console says, dialogs)."""
    page = browser.new_page(viewport={"width": 360, "height": 740})
    seen = SimpleNamespace(page=page, requests=[], faults=[])
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("console", lambda message: seen.faults.append(message.text))
    page.on("pageerror", lambda error: seen.faults.append(str(error)))
    page.on("dialog", lambda dialog: (seen.faults.append("a dialog"), dialog.dismiss()))
    page.goto(address)
    yield seen
    page.close()
