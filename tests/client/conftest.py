"""The command line in this process, against the platform of the test session."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from ethogram.cli.main import run
from ethogram.platform.stack import Platform


class Answer(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Answer]


@pytest.fixture
def cli(platform: Platform, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.setenv("ETHOGRAM_URL", platform.url)

    def call(*arguments: str) -> Answer:
        with pytest.raises(SystemExit) as left:
            run(list(arguments))
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Answer(left.value.code if isinstance(left.value.code, int) else 1, out, err)

    return call
