from pathlib import Path

import pytest

from tests.tiny import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", "Model")
