"""The phone's store and downloads: suites of node's own test runner against repositories published here."""

import gzip
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from delivery import Publisher, bundle_of
from phone import HERE, Phone
from pitstop import records
from pitstop.bundle.manifest import PIECE

TRUST = "src/pitstop/device/web/trust"
FIVE_KB = 5000  # bytes of the TUF client, compressed


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One repository as it was after each of three publications, and one with a blob of three pieces."""
    folder = tmp_path_factory.mktemp("repositories")
    publisher = Publisher(tmp_path_factory.mktemp("publisher"))
    base = publisher.base()
    for name, counter in (("first", 0), ("second", 1), ("third", 2)):
        publisher.publish(publisher.adapter(base, seed=counter, counter=counter) if counter else base)
        shutil.copytree(publisher.repository, folder / name)
    (folder / "1.root.json").write_bytes(publisher.root_json)
    other = Publisher(tmp_path_factory.mktemp("other"))
    large = other.base(rows=3 * PIECE // 128 - 50_000)
    other.publish(large)
    shutil.copytree(other.repository, folder / "large")
    records.save_json(bundle_of(large).artifact, folder / "large/artifact.json")
    return folder


@pytest.mark.parametrize("suite", ["life", "download"])
def test_a_suite_of_the_phone(phone: Phone, repositories: Path, suite: str) -> None:
    command = ["node", "--no-warnings", "--test-reporter=tap", phone.built / HERE / f"{suite}.test.js"]
    environment = os.environ | {"PITSTOP_REPOSITORIES": str(repositories)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    counts = {name: int(count) for name, count in re.findall(r"^# (tests|pass|fail|skipped) (\d+)$", ran.stdout, re.M)}
    print(counts)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert counts["pass"] == counts["tests"] >= 15


def test_the_tuf_client_is_small(phone: Phone) -> None:
    """As a static host may send it: without comments and indentation, compressed."""
    files = sorted((phone.built / TRUST).glob("*.js"))
    code = "\n".join(file.read_text() for file in files)
    size = len(gzip.compress(re.sub(r"\n\s*", "\n", code).encode(), 9))
    print(f"{len(files)} files, {size} bytes compressed")
    assert len(files) == 5
    assert size <= FIVE_KB
