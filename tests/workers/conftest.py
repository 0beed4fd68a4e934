from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workers.stack import Stack


@pytest.fixture
def stack(tmp_path: Path, redis_url: str) -> Iterator[Stack]:
    """A platform of workers that lives as long as the test."""
    made = Stack(tmp_path, redis_url)
    try:
        yield made
    finally:
        made.close()
