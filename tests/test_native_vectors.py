"""The vectors for native apps say what is true: the Python device does with each case what the vectors say it must."""

import json
import shutil
from pathlib import Path

import pytest
from native_vectors import PIECE, write

from delivery import write_bundle
from pitstop.device.updater import update
from pitstop.errors import PitstopError
from serving import ALPHA, BASE, QUESTIONS, Board, board

__all__ = ["board"]


@pytest.fixture(scope="module")
def vectors(board: Board, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    bundles = []
    for name, bundle in board.release.bundles.items():
        file = board.base if bundle.kind == "base" else board.adapters[name]
        (folder / name).mkdir()
        (folder / name / bundle.artifact.name).symlink_to(file)
        bundles.append(write_bundle(folder / name, bundle))
    write(bundles, folder / "vectors")
    return folder / "vectors"


def test_every_case_ends_as_it_says(vectors: Path, tmp_path: Path) -> None:
    described = json.loads((vectors / "vectors.json").read_text())
    root = (vectors / "1.root.json").read_bytes()
    assert [case["expect"] for case in described["cases"]].count("installed") == 1
    for case in described["cases"]:
        device, offered = tmp_path / case["name"] / "device", tmp_path / case["name"] / "repository"
        if case["installed_before"] != "nothing":
            update(device, str(vectors / "repository"), root_json=root)
        shutil.copytree(vectors / "repository", offered, copy_function=lambda one, two: Path(two).hardlink_to(one))
        for path in case["over"]:
            (offered / path).unlink()
            shutil.copyfile(vectors / "cases" / case["name"] / path, offered / path)
        if case["expect"] == "installed":
            assert update(device, str(offered), root_json=root, channel=described["channel"]).changed
        else:
            with pytest.raises(PitstopError):
                update(device, str(offered), root_json=root, channel=described["channel"])
        shutil.rmtree(tmp_path / case["name"])


def test_pieces_and_golden_answers_are_those_of_the_files(vectors: Path, board: Board) -> None:
    described = json.loads((vectors / "vectors.json").read_text())
    assert described["piece_bytes"] == PIECE
    for digest, pieces in described["pieces"].items():
        size = (vectors / "repository/blobs/sha256" / digest).stat().st_size
        assert pieces["bytes"] == size
        assert len(pieces["sha256"]) == (-(-size // PIECE) if size > PIECE else len(pieces["sha256"]))
    golden = {(one["model"], one["messages"][0]["content"]): one for one in described["golden"]}
    for name in (BASE, ALPHA):
        assert golden[name, QUESTIONS[0]]["answer"] == board.expected[name, QUESTIONS[0]]
        assert min(golden[name, QUESTIONS[0]]["lead_nats"]) > 0
