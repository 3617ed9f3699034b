"""Tests that depend on the version of transformers: what 4.57 cannot do, said where it is."""

from __future__ import annotations

import pytest
import transformers

IS_VERSION_4 = transformers.__version__.startswith("4.")


def needs_transformers_5(reason: str) -> pytest.MarkDecorator:
    """Skips a test where transformers 4.57 is installed."""
    return pytest.mark.skipif(IS_VERSION_4, reason=f"transformers 4.57: {reason}")
