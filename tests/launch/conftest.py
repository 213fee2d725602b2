from pathlib import Path

import pytest

from tests.launch.runs import write_text


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of generated text, one subfolder a domain."""
    return write_text(tmp_path_factory.mktemp("runs") / "text")
