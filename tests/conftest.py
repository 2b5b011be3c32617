"""Fixtures every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real photographs beside the checkout; tests that need it skip where it does not exist."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the optional real photographs in {folder}")
    return folder


@pytest.fixture(autouse=True)
def _same_draws_in_every_test() -> None:
    torch.manual_seed(0)
