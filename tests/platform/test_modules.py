"""A platform in a project whose modules have the names of ours."""

from __future__ import annotations

from pathlib import Path

import psutil

from ethogram.platform.stack import Platform
from tests.platform.test_up import run_a_job


def test_modules_of_the_users_own_are_not_mistaken_for_ours_by_the_demo(platform: Platform) -> None:
    for name in ("gateway", "worker", "reconciler", "inference"):
        assert Path(psutil.Process(platform.children[name].pid).cwd(), "services", "__init__.py").exists()
    run_a_job(platform.url)
