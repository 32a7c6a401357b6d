"""Test vectors for apps that read repositories by themselves: devices/phone-native/SPEC.md says what they must do.

    python tools/native_vectors.py BASE_BUNDLE ADAPTER_BUNDLE... --to FOLDER

Takes bundle folders as `pitstop pack` makes them (one base and its adapters), publishes them twice with keys that are
thrown away, and writes:

    FOLDER/vectors.json      the cases with what must come of each, the pieces of every file, and golden answers
    FOLDER/1.root.json       what the app trusts
    FOLDER/repository/       as a host offers it
    FOLDER/cases/NAME/…      files laid over the repository for a case, under the same paths
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pitstop import records
from pitstop.bundle.manifest import PIECE, Bundle
from pitstop.engines.base import PLAIN_BASE, Sampling, Use
from pitstop.engines.llama import LlamaEngine
from pitstop.engines.template import render
from pitstop.files import sha256_pieces
from pitstop.repository import keys
from pitstop.repository.publish import MANIFEST, publish

QUESTIONS = ("What is the capital of France?", "What is the opposite of hot?", "Name three colours.")
ANSWER = 12  # tokens
CONTEXT = 512  # tokens

Change = Callable[[bytes], bytes]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundles", type=Path, nargs="+", help="bundle folders: one base and its adapters")
    options.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    given = options.parse_args()
    write(given.bundles, given.to)


def write(folders: list[Path], target: Path) -> None:
    """Write the vectors of these bundles into a new folder."""
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        signers = Path(scratch, "keys")
        keys.create(signers)
        repository = target / "repository"
        publish(folders, repository, signers)
        shutil.copyfile(repository / "metadata/1.root.json", target / "1.root.json")
        older = (repository / "metadata/timestamp.json").read_bytes()
        publish([_next(folder, Path(scratch, f"{at}")) for at, folder in enumerate(folders)], repository, signers)
    bundles = [_bundle(folder) for folder in folders]
    described = {
        "channel": "stable",
        "piece_bytes": PIECE,
        "cases": _cases(target, repository, older),
        "pieces": {path.name: _pieces(path) for path in sorted((repository / "blobs/sha256").iterdir())},
        "golden": [one for bundle in bundles for one in _golden(bundle, bundles, folders)],
    }
    (target / "vectors.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _bundle(folder: Path) -> Bundle:
    return records.load_json(Bundle, folder / MANIFEST)


def _next(folder: Path, target: Path) -> Path:
    """Write the same bundle with the next counter: a second version of the repository."""
    bundle = _bundle(folder)
    target.mkdir()
    for artifact in bundle.artifacts:
        (target / artifact.name).symlink_to((folder / artifact.name).absolute())
    changed = replace(bundle, counter=bundle.counter + 1, version=f"{bundle.version}.1")
    records.save_json(changed, target / MANIFEST)
    return target


def _cases(target: Path, repository: Path, older: bytes) -> list[dict[str, Any]]:
    """Write what is laid over the repository for each case, and return them with what must come of it."""
    blob = max((repository / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    manifest = next((repository / "targets/bundles/base").rglob("*.json"))
    snapshot = max((repository / "metadata").glob("*.snapshot.json"), key=lambda path: int(path.name.partition(".")[0]))
    changes: list[tuple[str, Path, Change, str, str]] = [
        ("timestamp-edited", repository / "metadata/timestamp.json", _flipped, "nothing", "its signature fails"),
        ("snapshot-edited", snapshot, _flipped, "nothing", "its digest or signature fails"),
        ("manifest-edited", manifest, _flipped, "nothing", "it is not the file that was signed"),
        ("blob-flipped", blob, _flipped, "nothing", "a piece of it has another digest"),
        ("blob-cut", blob, lambda data: data[:-1], "nothing", "it ends before its size"),
        ("blob-missing", blob, lambda _: b"", "nothing", "the host does not have it"),
        ("replayed", repository / "metadata/timestamp.json", lambda _: older, "the newest", "a lower version was seen"),
    ]
    cases: list[dict[str, Any]] = [
        {"name": "good", "over": [], "installed_before": "nothing", "expect": "installed", "why": "all of it verifies"}
    ]
    for name, path, change, before, why in changes:
        inside = path.relative_to(repository)
        laid = target / "cases" / name / inside
        laid.parent.mkdir(parents=True)
        laid.write_bytes(change(path.read_bytes()))
        cases.append({"name": name, "over": [str(inside)], "installed_before": before, "expect": "refused", "why": why})
    return cases


def _flipped(data: bytes) -> bytes:
    """Return the data with one bit changed in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _pieces(path: Path) -> dict[str, Any]:
    digest, pieces = sha256_pieces(path, PIECE)
    assert digest == path.name
    return {"bytes": path.stat().st_size, "sha256": list(pieces)}


def _golden(bundle: Bundle, bundles: list[Bundle], folders: list[Path]) -> list[dict[str, Any]]:
    """Answer every question greedily on the base, under a bundle's adapter if it is one."""
    files = {one.name: folder / one.artifact.name for one, folder in zip(bundles, folders, strict=True)}
    base = next(one for one in bundles if one.kind == "base")
    found = []
    with LlamaEngine(
        files[base.name], base_sha256=base.base_sha256, context_length=CONTEXT, sequences=1, threads=1
    ) as engine:
        use = PLAIN_BASE
        if bundle.kind == "adapter":
            engine.load_adapter(bundle.name, files[bundle.name])
            use = Use(bundle.name, bundle.scale)
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            prompt = render(bundle.prompting, messages)
            tokens = engine.tokenize(prompt)
            pieces = list(engine.generate(tokens, use, Sampling(max_tokens=ANSWER, logprobs=2)))
            leads = [round(piece.likeliest[0][1] - piece.likeliest[1][1], 3) for piece in pieces]
            found.append(
                {
                    "model": bundle.name,
                    "messages": messages,
                    "prompt": prompt,
                    "prompt_tokens": tokens,
                    "answer_tokens": [piece.token for piece in pieces],
                    "answer": "".join(piece.text for piece in pieces),
                    "lead_nats": leads,
                }
            )
    return found


if __name__ == "__main__":
    main()
