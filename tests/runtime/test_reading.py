"""Reading what users bring: every way in which a file can be wrong names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel
from safetensors.torch import load_file

from ethogram.errors import InvalidInput
from services.runtime.reading import reading


class Config(BaseModel):
    """What the tests read."""

    width: int


def read(folder: Path, field: str | None = None) -> Config:
    with reading(folder, "config.json", "thing", field) as path:
        about = json.loads(path.read_text())
        if about["weights"]:
            load_file(folder / about["weights"])
        return Config.model_validate(about["config"])


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (None, "is missing; is {folder} a thing?"),
        ("{", "cannot be read, or does not fit the other files (JSONDecodeError); make the thing again"),
        ("[]", "cannot be read, or does not fit the other files (TypeError); make the thing again"),
        ("{}", "has no weights"),
        ('{"weights": "none.safetensors"}', "needs none.safetensors, which is missing; make the thing again"),
        ('{"weights": "config.json"}', "cannot be read, or does not fit the other files (SafetensorError)"),
    ],
)
def test_what_is_wrong_is_told_of_the_file_or_of_the_field_that_named_its_folder(
    text: str | None, wrong: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidInput) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"config.json: {wrong.format(folder=tmp_path)}")
    assert caught.value.violations[0].field == "config.json"
    with pytest.raises(InvalidInput) as caught:
        read(tmp_path, "spec.thing")
    assert str(caught.value).startswith(f"spec.thing: {tmp_path / 'config.json'} {wrong.format(folder=tmp_path)}")


def test_a_field_that_pydantic_refuses_and_errors_that_are_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"weights": "", "config": {"width": "wide"}}')
    with pytest.raises(InvalidInput, match=r"^config\.json\.width: .*integer"):
        read(tmp_path)
    (tmp_path / "config.json").write_text('{"weights": "", "config": {"width": 3}}')
    assert read(tmp_path).width == 3
    with pytest.raises(InvalidInput, match=r"^mine: as it was$"), reading(tmp_path, "config.json", "thing"):
        raise InvalidInput.field("mine", "as it was")


def test_a_folder_that_is_not_there_or_one_too_high_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere does not exist$"):
        read(tmp_path / "nowhere")
    (tmp_path / "run" / "thing").mkdir(parents=True)
    (tmp_path / "run" / "thing" / "config.json").write_text("{}")
    with pytest.raises(InvalidInput, match=r"is missing; did you mean .*run/thing\?$"):
        read(tmp_path / "run")
