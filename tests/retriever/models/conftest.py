from __future__ import annotations

import pytest
from folder_helpers import encoder_folder

from retriever.config.model import ModelConfig


@pytest.fixture(scope="module")
def encoder(tiny: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    return encoder_folder(tiny, tmp_path_factory.mktemp("encoder"))
