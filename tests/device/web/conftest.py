"""For the tests of web/: engines in node, on a random base with three adapters; and a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import build_web_engine
import pytest

from phone import Phone, phone
from tiny_models import tiny_adapter, tiny_base
from wasm_engine import Open, WasmEngine, built

ADAPTERS = ("red", "green", "blue")


@pytest.fixture(scope="session")
def engine_folder() -> Path:
    """The engine as `make web` builds it."""
    programs = [name for name in ("node", "npm") if shutil.which(name) is None]
    if missing := build_web_engine.missing_packages() + programs:
        pytest.skip(f"the page's engine needs: apt-get install {' '.join(missing)}")
    return built()


@pytest.fixture(scope="session")
def tiny(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(smollm2_gguf, tmp_path_factory.mktemp("tiny") / "base.gguf")


@pytest.fixture(scope="session")
def tiny_adapters(tiny: Path) -> dict[str, Path]:
    return {name: tiny_adapter(tiny, tiny.with_name(f"{name}.gguf"), seed) for seed, name in enumerate(ADAPTERS)}


@pytest.fixture
def open_engine(engine_folder: Path, tmp_path: Path) -> Iterator[Open]:
    """Starts an engine, loads a base if one is given and adapters by their names."""
    engines: list[WasmEngine] = []

    def make(base: Path | None = None, adapters: dict[str, Path] | None = None, **settings: Any) -> WasmEngine:
        engine = WasmEngine(engine_folder, tmp_path, **settings)
        engines.append(engine)
        if base is not None:
            engine.load(base)
        for name, path in (adapters or {}).items():
            engine.add_adapter(name, path)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session", name="phone")
def one_phone() -> Iterator[Phone]:
    """The phone, ended with the tests."""
    yield phone
    phone.close()
