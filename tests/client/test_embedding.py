"""Embed, describe and recommend from the command line, by an encoder that a user uploaded and published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ethogram.cli.embedding import Recommendation
from ethogram.client import Client
from ethogram.embedding import Embedding, Field, Recommended
from ethogram.platform.stack import Platform
from services.resource.codec import ResourceCodec
from tests.client.conftest import Cli
from tests.tiny_encoder import ROWS, random_encoder, save_characters


@pytest.fixture(scope="module")
def encoder(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> ResourceCodec:
    """The published model ``vectors``."""
    folder = tmp_path_factory.mktemp("encoder")
    codec = random_encoder(save_characters(folder / "language"))
    codec.save(folder / "encoder")
    with Client(platform.url) as client:
        client.publish("vectors", client.put(folder / "encoder", name="encoder", type="resource-encoder").id)
    return codec


SET = ("--set", "size=small", "--set", "cores=2", "--set", "memory=4", "--set", "latency=120.5")


def test_a_file_is_embedded_and_described(cli: Cli, encoder: ResourceCodec, tmp_path: Path) -> None:
    expected = encoder.embed(*encoder.vectors(ROWS)).numpy()
    # As the table of measurements has it, with another order and other names.
    lines = ["input_size,tool,cores,memory,latency"]
    lines += [",".join(str(row[name]) for name in ("size", "tool", "cores", "memory", "latency")) for row in ROWS]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name in ("rows.csv", "rows.jsonl"):
        output = str(tmp_path / f"{name}.safetensors")
        answer = cli("embed", "vectors", str(tmp_path / name), "-o", output, "--json")
        assert answer.code == 0 and answer.json["tensors"] == {"embeddings": [3, 32]}
        np.testing.assert_allclose(load_file(output)["embeddings"], expected, rtol=1e-5, atol=1e-6)
        texts = cli("describe", "vectors", str(tmp_path / name), "--json").json["texts"]
        assert texts == cli("describe", "vectors", "--embeddings", output, "--json").json["texts"]
    output = str(tmp_path / "one.safetensors")
    answer = cli("embed", "vectors", "--tool", "read", *SET, "-o", output)
    assert (answer.code, answer.out) == (0, "") and "embeddings [32]" in answer.err
    np.testing.assert_allclose(load_file(output)["embeddings"], expected[0], rtol=1e-5, atol=1e-6)
    assert cli("describe", "vectors", "--tool", "read", *SET).out == texts[0] + "\n"
    # What is left out is unknown.
    said = cli("describe", "vectors", "--tool", "read", "--set", "cores=2")
    unknown = ("size=unknown", "memory=unknown", "latency=unknown")
    more = [part for value in unknown for part in ("--set", value)]
    assert said.code == 0 and said.out == cli("describe", "vectors", "--tool", "read", "--set", "cores=2", *more).out


def test_what_is_outside_the_range_is_told(cli: Cli, encoder: ResourceCodec, tmp_path: Path) -> None:
    answer = cli("embed", "vectors", "--tool", "read", "--set", "latency=5000", "-o", str(tmp_path / "a.safetensors"))
    assert answer.code == 0 and "outside the range of training, so less certain: latency\n" in answer.err
    (tmp_path / "rows.csv").write_text("tool,size,cores,memory\n" + "read,small,99,4\n" * 5)
    answer = cli("describe", "vectors", str(tmp_path / "rows.csv"))
    says = (
        "outside the range of training, so less certain: line 2: cores; line 3: cores; line 4: cores and 2 more lines"
    )
    assert says in answer.err


def test_rounding_is_told_of_descriptions_alone(cli: Cli, encoder: ResourceCodec, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("tool,latency\nread,120.55\nread,\nread,3.5\n")
    for more in ((), ("--json",)):
        answer = cli("describe", "vectors", str(tmp_path / "rows.csv"), *more)
        assert "latency: descriptions round 1 of 2 numbers to 1 decimals" in answer.err
    assert (
        "descriptions round"
        not in cli("embed", "vectors", str(tmp_path / "rows.csv"), "-o", str(tmp_path / "a.safetensors")).err
    )
    # That is an error of floating point.
    assert (
        "descriptions round" not in cli("describe", "vectors", "--tool", "read", "--set", "latency=120.0000000001").err
    )


def test_a_configuration_is_recommended(cli: Cli, encoder: ResourceCodec) -> None:
    answer = cli("recommend", "vectors", "--tool", "read", "--set", "size=large", "--latency", "90", "--json")
    assert answer.code == 0 and answer.json["fits"] and answer.json["configurations"]["size"] == "large"
    assert answer.json["chosen"] == ["cores", "memory"] and answer.json["outside"] == []
    shown = cli("recommend", "vectors", "--tool", "read", "--set", "input_size=large", "--bound", "90")
    assert shown.code == 0 and shown.err == "" and "below, at 0.9" in shown.out and "4 cores" in shown.out
    answer = cli("recommend", "vectors", "--tool", "read", "--latency", "1")
    assert answer.code == 1 and "no configuration stays below 1 at 0.9; this one comes closest" in answer.err
    assert "size is not given: this is the closest for size=small; give --set size=..." in answer.err
    assert "cores" in answer.out and "cheapest" not in answer.err
    assert "drawn at random" not in answer.err
    answer = cli("recommend", "vectors", "--tool", "read", "--latency", "90", "--json")
    assert "size is not given, and has no price: this is the cheapest for size=small; give --set size=..." in answer.err


def test_fields_may_be_called_as_results_are(capsys: pytest.CaptureFixture[str]) -> None:
    fields = [Field(name, name, "", [], 0.0, 9.0, 0, 1.0, measured=name == "y") for name in ("price", "chosen", "y")]
    found = {"price": 3.0, "chosen": 4.0}
    Recommendation(
        found, 7.0, 1.0, 2.0, fits=True, outside=[], dimension=fields[2], bound=5.0, confidence=0.9, free=fields[:2]
    ).show(fields)
    shown = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert shown[:3] == [["price", "3"], ["chosen", "4"], ["price", "7"]] and shown[-1] == ["chosen", "price, chosen"]


def test_all_calls_of_a_command_ask_one_version(
    cli: Cli, encoder: ResourceCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latest one may be another by the second call."""
    versions: list[str | None] = []

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, version: str | None = None, **options: Any) -> Any:
            versions.append(version)
            return method(*arguments, version=version, **options)

        return call

    for name in ("embed", "describe", "recommend"):
        monkeypatch.setattr(Embedding, name, watched(getattr(Embedding, name)))
    for name, *more in (("embed", "-o", str(tmp_path / "a")), ("describe",), ("recommend", "--latency", "90")):
        assert cli(name, "vectors", "--tool", "read", *more).code == 0
    assert versions == ["1", "1", "1"]


def test_measurements_that_were_left_out_are_counted(
    cli: Cli, encoder: ResourceCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(self: Embedding, *arguments: Any, **options: Any) -> Recommended:
        return whole(self, *arguments, **options)._replace(measurements=4000, measurements_left_out=1234)

    whole = Embedding.recommend
    asked = ("recommend", "vectors", "--tool", "read", "--latency", "900")
    assert cli(*asked, "--json").json["measurements"] == 36
    monkeypatch.setattr(Embedding, "recommend", some)
    assert "predicted from 4,000 of the 5,234 measurements, drawn at random" in cli(*asked).err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("tool,speed\nread,3\n", "rows.csv:2.speed: there is no such field; there are tool, size, cores"),
        ("tool,core\nread,3\n", "did you mean cores?"),
        ("tool,size,cores,memory\nread,small,2,4\nread,small,many,4\n", "rows.csv:3.cores: 'many' is not a number"),
        ("tool,size,cores,memory\nread,small,2\n", "rows.csv:2: has not as many cells as the header"),
        ("tool,size,cores,memory\n", "has no rows"),
        ('{"tool": "read"}\n[3]\n', "rows.csv:2: is not a JSON object"),
        ('{"tool": "read"}\n\n{}\n', "rows.csv:3: is not a JSON object of values by field"),
        ("tool,cores,cores\nread,2,4\n", "rows.csv:1.cores: is there twice"),
        (
            "tool,size,input_size\nread,small,large\n",
            "rows.csv:2.input_size: is there twice, as size and as input_size",
        ),
        ('{"tool": "read"}\n{"tool": "read", "cores": 2, "cores": 4}\n', "rows.csv:2.cores: is there twice"),
        ('{"tool": "read", "cores": true}\n', "rows.csv:1.cores: true is not a number"),
        ('{"tool": "read", "size": false}\n', "rows.csv:1.size: false is not a label"),
        (f'{{"tool": "read", "cores": 1{400 * "0"}}}\n', "rows.csv:1.cores: is too large"),
        ("tool,size\n\nread,small\nread\n", "rows.csv:4: has not as many cells"),
        ("tool,size,cores\n\nread,small,2\nread,huge,2\n", "rows.csv:4.size: must be one of small, large, not 'huge'"),
        (
            "tool,input_size,cores\nread,small,2\nread,huge,2\n",
            "rows.csv:3.input_size: must be one of small, large, not 'huge'",
        ),
        (
            '{"tool": "read", "size": "small"}\n{"tool": "read", "input_size": "huge"}\n',
            "rows.csv:2.input_size: must be",
        ),
        (
            "tool,size,cores\nread,small,2.5\n",
            "rows.csv:2.cores: 2.5 has more decimals than its descriptions, which have",
        ),
        ("size,cores\nsmall,2\n", "rows.csv.tool: is missing: the tool must be known"),
        ("tool,size\n" + "read,small\n" * 40 + "read,huge\n", "rows.csv:42.size: must be one of small, large"),
    ],
)
def test_wrong_files(cli: Cli, encoder: ResourceCodec, tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "rows.csv").write_text(content)
    answer = cli("describe", "vectors", str(tmp_path / "rows.csv"))
    assert answer.code == 2 and says in answer.err


def test_wrong_options(cli: Cli, encoder: ResourceCodec, tmp_path: Path) -> None:
    for arguments, says in (
        (("embed", "vectors"), "give a FILE of configurations, or one with --tool"),
        (("embed", "vectors", str(tmp_path / "none.csv")), "none.csv cannot be read"),
        (("describe", "vectors", "some.csv", "--tool", "read"), "excludes --tool and --set"),
        (("describe", "vectors", "some.csv", "--embeddings", "a.safetensors"), "excludes configurations"),
        (("describe", "vectors", "--tool", "read", "--set", "cores"), "cores is not of the form FIELD=VALUE"),
        (("describe", "vectors", "--tool", "read", "--set", "speed=3"), "there is no such field; there are tool, size"),
        (("describe", "vectors", "--tool", "read", "--set", "cores=x"), "--set cores: 'x' is not a number"),
        (("describe", "vectors", "--tool", "read", "--set", "core=3"), "did you mean cores?"),
        (("describe", "vectors", "--tool", "read", "--set", "size=huge"), "--set size: must be one of small, large"),
        (("describe", "vectors", "--tool", "read", "--set", "cores=1", "--set", "cores=2"), "--set cores: is given tw"),
        (("describe", "vectors", "--tool", "read", "--template", "x"), "--template: there is no 'x'"),
        (("describe", "vectors", "--tool", "fly", *SET), "--tool: must be one of read, write, not 'fly'"),
        (("describe", "vectors", "--tool", "read", "--set", "input_size=huge"), "--set input_size: must be one of sm"),
        (("recommend", "vectors", "--tool", "read", "--bound", "0"), "--latency/--bound: must be a number above 0"),
        (
            ("recommend", "vectors", "--tool", "read", "--latency", "5", "--confidence", "2"),
            "--confidence: must be betw",
        ),
    ):
        answer = cli(*arguments)
        assert answer.code == 2 and says in answer.err
