"""Tests that depend on the version of transformers: what an older one cannot do, said where it is."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

INSTALLED = Version(transformers.__version__)
IS_VERSION_4 = INSTALLED.major == 4


def needs_transformers(least: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test where an older transformers is installed.

    Args:
        least: The oldest version in which it was seen to work.
        reason: What older ones do instead.
    """
    return pytest.mark.skipif(Version(least) > INSTALLED, reason=f"transformers before {least} {reason}")
