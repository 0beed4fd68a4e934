from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gateway.running import Gateway, running


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Gateway]:
    """One gateway for the tests of a module."""
    with running(tmp_path_factory.mktemp("state"), redis_url, body_limit=64 * 1024, upload_limit=3 * 2**20) as gateway:
        yield gateway
