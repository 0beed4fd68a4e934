"""Server-sent events as bytes."""

from __future__ import annotations

import json

import pytest

from ethogram.errors import Internal
from ethogram.sse import Frame, Parser

STREAM = (
    b': hello\n\nid: 1\nevent: log\ndata: {"text": "one\xe2\x80\xa8line"}\n\n'
    b"event: progress\r\ndata: {\r\ndata: }\r\n\r\nid:2\ndata:x\n\ndata: cut"
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_come_out_whole_however_the_bytes_are_cut(size: int) -> None:
    parser = Parser()
    chunks = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    assert [frame for chunk in chunks for frame in parser.feed(chunk)] == [
        Frame("log", json.dumps({"text": "one\u2028line"}, ensure_ascii=False), "1"),
        Frame("progress", "{\n}", "1"),
        Frame("message", "x", "2"),
    ]


def test_data_that_is_no_json_is_the_servers_fault() -> None:
    with pytest.raises(Internal):
        Frame("log", "<html>", "1").json()
