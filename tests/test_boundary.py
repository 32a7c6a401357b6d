"""The boundary: what runs on a board, and `pitstop --help`, load neither torch nor anything else of the workshop."""

import json
import pkgutil
import subprocess
import sys

import pytest

import pitstop

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}
WORKSHOP_ONLY = HEAVY | {"pitstop.workshop"}


def modules_after(script: str) -> set[str]:
    """Run a script in a fresh process and return the names of all modules it loaded."""
    script += "\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def modules_of(package: str) -> list[str]:
    """Return the names of a package of pitstop and of everything below it."""
    folder = f"{pitstop.__path__[0]}/{package}"
    found = [module.name for module in pkgutil.walk_packages([folder], f"pitstop.{package}.")]
    return [f"pitstop.{package}", *found]


@pytest.mark.parametrize("package", ["bundle", "device", "repository", "retention"])
def test_a_package_of_the_light_side_loads_nothing_heavy(package: str) -> None:
    wanted = modules_of(package)
    assert len(wanted) > 2
    loaded = modules_after("\n".join(f"import {name}" for name in wanted))
    assert set(wanted) <= loaded
    assert not loaded & WORKSHOP_ONLY


def test_the_device_never_loads_what_publishes() -> None:
    loaded = modules_after("\n".join(f"import {name}" for name in modules_of("device")))
    assert "pitstop.repository" not in loaded


def test_an_engine_file_loads_its_own_library_only() -> None:
    assert not modules_after("import pitstop.engines.llama") & HEAVY
    assert not modules_after("import pitstop.engines.onnx") & {*HEAVY, "llama_cpp"}
    assert not modules_after("import pitstop.engines.base, pitstop.engines.template") & {
        *HEAVY,
        "llama_cpp",
        "onnxruntime_genai",
    }


@pytest.mark.slow
def test_the_torch_engine_does_not_load_llama() -> None:
    pytest.importorskip("torch", reason="the workshop extra is not installed")
    assert "llama_cpp" not in modules_after("import pitstop.engines.torch")


COMMANDS = {"pitstop.errors", "pitstop.cli"} | {
    f"pitstop.cli.{name}" for name in ("builder", "device", "frame", "publisher", "suites")
}


def test_help_and_version_load_no_stage() -> None:
    for arguments in (["--help"], ["--version"], ["train", "--help"]):
        script = (
            f"import sys; sys.argv = ['pitstop', *{arguments}]\nfrom pitstop.cli import main\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0"
        )
        loaded = modules_after(script)
        assert {name for name in loaded if name.startswith("pitstop.")} == COMMANDS
        assert not loaded & (HEAVY | {"numpy", "tuf", "llama_cpp", "rich.progress"})


def test_doctor_needs_the_base_install_only() -> None:
    blocked = sorted(HEAVY | {"llama_cpp", "starlette", "uvicorn", "cryptography", "openai", "gguf", "hassil"})
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))  # importing any of these now fails\n"
        "from pitstop import doctor\nassert doctor.describe(doctor.examine())"
    )
    assert "pitstop.doctor" in modules_after(script)
