from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("storage_made", Path(__file__).with_name("made.py"))
_made = importlib.util.module_from_spec(_spec)
sys.modules["storage_made"] = _made
_spec.loader.exec_module(_made)
_spec = importlib.util.spec_from_file_location("storage_stores", Path(__file__).with_name("stores.py"))
_stores = importlib.util.module_from_spec(_spec)
sys.modules["storage_stores"] = _stores
_spec.loader.exec_module(_stores)
_spec = importlib.util.spec_from_file_location("storage_hub", Path(__file__).with_name("hub.py"))
_hub = importlib.util.module_from_spec(_spec)
sys.modules["storage_hub"] = _hub
_spec.loader.exec_module(_hub)


@pytest.fixture(scope="session")
def made():
    """The module that makes small caches (`made.py`)."""
    return _made


@pytest.fixture(scope="session")
def hub():
    """The module of a hub on loopback (`hub.py`)."""
    return _hub


@pytest.fixture(scope="session")
def stores():
    """The module of servers on loopback (`stores.py`)."""
    return _stores
