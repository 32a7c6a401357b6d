from collections.abc import Iterator

import pytest

from forgetting import BigramEngine
from pitstop.progress import be_quiet


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    be_quiet()
    yield
    be_quiet(False)


@pytest.fixture
def engine() -> BigramEngine:
    return BigramEngine()
