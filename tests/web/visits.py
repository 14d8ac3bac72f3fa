"""What tests of the page type, and look for on its server."""

from __future__ import annotations

EVIL = "<img src=x onerror=\"document.title = 'owned'\">"
"""What must be shown as it was typed."""
TITLE = f"stickers {EVIL}"


def desk_of(site):
    """Whose methods the buttons of the page are."""
    return next(event.fn.__self__ for event in site.page.fns.values() if getattr(event.fn, "__name__", "") == "leave")


def ends_early(site, steps: list[float]) -> bool:
    """Waits for the end of a clip of 200 steps that has begun."""
    with site.studio._busy:
        count = len(steps)
    steps.clear()
    return 0 < count < 150
