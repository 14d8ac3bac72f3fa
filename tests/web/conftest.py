"""A page that is really served, visitors to it, and its model made slow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from tests.small_models import make_pipeline, small_dfgn, text_parts
from tests.waiting import PATIENCE
from tests.web.visits import TITLE


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A page of a small model that is really served, and its studio."""
    app = pytest.importorskip("rdtf_ds.web.app", reason="gradio (the extra `ui`) is not installed")
    from rdtf_ds.web.studio import Studio

    studio = Studio(make_pipeline(text_parts(), small_dfgn()), tmp_path_factory.mktemp("clips"), {"model": "0123456789abcdef"})
    page = app.build(studio, TITLE)
    yield SimpleNamespace(address=app.serve(page), studio=studio, page=page)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def context(browser) -> Iterator[object]:
    """One for all visitors: what the page loads is kept there, and each load of the page is a visitor of its own to gradio."""
    context = browser.new_context()
    yield context
    context.close()


@pytest.fixture
def visit(context, site):
    """A function that opens the page for one more visitor: ``page``, and the hosts and faults of all its doings."""
    visits = []

    def open_page(width: int = 1200) -> SimpleNamespace:
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 800})
        page.set_default_timeout(1000 * PATIENCE)
        seen = SimpleNamespace(page=page, hosts=set(), faults=[])
        page.on("request", lambda request: seen.hosts.add(urlsplit(request.url).netloc))
        page.on("websocket", lambda socket: seen.hosts.add(urlsplit(socket.url).netloc))
        page.on("pageerror", lambda error: seen.faults.append(str(error)))
        page.goto(site.address)
        page.wait_for_selector("#make")
        visits.append(seen)
        return seen

    yield open_page
    for seen in visits:
        hosts = seen.hosts - {"", urlsplit(site.address).netloc}  # data: and blob: have no host
        seen.page.close()
        assert hosts == set(), "the page asked somebody else than its server"
        assert seen.faults == []


@pytest.fixture
def steps(site, monkeypatch) -> list[float]:
    """When each step began, of which every one takes 0.2 s and more."""
    begun: list[float] = []
    original = site.studio.pipeline.unet.forward

    def slow(*arguments, **options):
        begun.append(time.monotonic())
        time.sleep(0.2)
        return original(*arguments, **options)

    monkeypatch.setattr(site.studio.pipeline.unet, "forward", slow)
    return begun
