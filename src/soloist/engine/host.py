"""What ranks on CPUs share: their host."""

from __future__ import annotations

import os


def host_bytes() -> int:
    """The host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
