"""An export of the small table."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.language.models import LanguageModel
from services.resource.data import Table
from services.resource.export import Export, export, validate
from tests.resource.conftest import small_trainer


@pytest.fixture(scope="session")
def export_folder(table: Table, language: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    export(small_trainer(table, language, encoder={"tokens": 2}).codec(), table, folder)
    return folder


@pytest.fixture(scope="session")
def exported(export_folder: Path) -> Export:
    return validate(export_folder)
