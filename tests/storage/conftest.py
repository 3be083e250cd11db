from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("storage_made", Path(__file__).with_name("made.py"))
_made = importlib.util.module_from_spec(_spec)
sys.modules["storage_made"] = _made
_spec.loader.exec_module(_made)


@pytest.fixture(scope="session")
def made():
    """The module that makes small caches (`made.py`)."""
    return _made
