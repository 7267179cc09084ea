"""Which of the served releases of SGLang is installed: `release` is its module.

The modules have the same names, and nobody else asks for a version: where releases mean something different
by the same thing, a function of each says it.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from sts_sglang.host import release_0_5_16, release_0_5_23

RELEASES = {module.VERSION: module for module in (release_0_5_16, release_0_5_23)}
NEWEST = release_0_5_23


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None when it is absent."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


# Of another version nothing is hooked (compat.check); the newest table says what has moved there.
release = RELEASES.get(installed_version("sglang"), NEWEST)
