"""Doctor: what is installed is found in pitstop's own metadata, and every gap comes with what to type."""

from importlib import metadata
from pathlib import Path

import pytest

from pitstop import doctor, records
from pitstop.workshop.export import llamacpp


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Packages and the version to pretend; None: not installed."""
    pretended: dict[str, str | None] = {}
    real = metadata.version

    def version(name: str) -> str:
        if name not in pretended:
            return real(name)
        found = pretended[name]
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    return pretended


def extra_of(diagnosis: doctor.Diagnosis, name: str) -> doctor.Extra:
    return next(extra for extra in diagnosis.extras if extra.name == name)


def test_extras_are_those_of_the_metadata() -> None:
    assert set(doctor.EXTRAS) == set(metadata.metadata("pitstop").get_all("Provides-Extra") or ())


def test_an_extra_made_of_others_needs_all_of_their_packages() -> None:
    diagnosis = doctor.examine()
    names = {package.name for package in extra_of(diagnosis, "device").packages}
    assert names >= {"llama-cpp-python", "starlette", "uvicorn"}
    assert "torch" not in names
    assert names < {package.name for package in extra_of(diagnosis, "demo").packages}
    assert "cattrs" in {package.name for package in diagnosis.base}
    assert "torch" not in {package.name for package in diagnosis.base}


def test_a_missing_package_makes_its_extras_missing_and_nothing_wrong(without: dict[str, str | None]) -> None:
    without["starlette"] = None
    diagnosis = doctor.examine()
    assert not extra_of(diagnosis, "serve").complete
    assert not extra_of(diagnosis, "device").complete
    assert diagnosis.problems == ()
    assert f"type: {extra_of(diagnosis, 'serve').install}" in doctor.describe(diagnosis)
    assert "[serve]" in extra_of(diagnosis, "serve").install


def test_a_version_that_does_not_fit_is_wrong(without: dict[str, str | None]) -> None:
    without["transformers"] = "4.30.0"
    diagnosis = doctor.examine()
    assert not extra_of(diagnosis, "workshop").complete
    (problem,) = diagnosis.problems
    assert problem.startswith("transformers 4.30.0: pitstop needs >=5.")
    assert "; type: " in problem
    assert problem in doctor.describe(diagnosis)


def test_a_missing_package_of_the_base_is_wrong(without: dict[str, str | None]) -> None:
    without["tuf"] = None
    assert any(problem.startswith("tuf is missing") for problem in doctor.examine().problems)


def test_no_compiler_is_wrong_only_while_llama_is_missing(
    without: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    without["llama-cpp-python"] = "0.3.36"
    assert doctor.examine().problems == ()
    without["llama-cpp-python"] = None
    assert doctor.examine().problems == (
        "no C++ compiler, needed to install llama.cpp; on Debian type: apt-get install g++",
    )


def test_the_converter_is_the_one_export_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed").__version__
    monkeypatch.setenv("PITSTOP_CACHE", str(tmp_path))
    assert doctor.examine().converter is None
    (tmp_path / f"llama-cpp-converters-{version}").mkdir()
    assert doctor.examine().converter == version
    assert llamacpp.converter_folder() == tmp_path / f"llama-cpp-converters-{version}"


def test_a_diagnosis_is_a_record() -> None:
    diagnosis = doctor.examine()
    assert records.from_json(doctor.Diagnosis, records.to_json(diagnosis)) == diagnosis
