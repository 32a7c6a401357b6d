"""A phone refuses what a board refuses: the board's own tests of attacks and formats, asked of both side by side.

Their modules are loaded once more under another name, with what they call replaced by a function that asks both.
"""

import importlib.util
import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from securesystemslib.formats import encode_canonical

from delivery import Forger, Publisher, Server, artifact_of, bundle_of
from phone import Phone, Refused, phone, update_both
from pitstop import records
from pitstop.bundle import binding
from pitstop.bundle.formats import GgufHeader, gguf
from pitstop.bundle.manifest import PIECE, Bundle, check_bundle
from pitstop.device import activation
from pitstop.device.activation import State
from pitstop.device.floor import Floor, Seen, rise, rise_counters
from pitstop.errors import BaseMismatch, FormatError, PitstopError, RecordError, Untrusted
from pitstop.repository import keys

TESTS = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("phone")


def again(path: str, without: tuple[str, ...] = (), **replaced: Any) -> dict[str, Any]:
    """Return the tests and fixtures of a module, with other functions under some of its names."""
    spec = importlib.util.spec_from_file_location(f"again_{Path(path).stem}", TESTS / path)
    assert spec
    assert spec.loader
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in replaced.items():
        assert hasattr(module, name)
        setattr(module, name, value)
    kinds = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    return {name: value for name, value in kinds.items() if name not in without}


def read_both(path: Path) -> GgufHeader:
    """Read a header here and on the phone: both read the same, or both refuse."""
    try:
        header = gguf.read_gguf(path)
    except FormatError:
        with pytest.raises(Refused):
            phone.ask("header", path)
        raise
    found = phone.ask("header", path)
    assert (found["version"], found["alignment"]) == (header.version, header.alignment)
    assert found["dataOffset"] == header.data_offset
    assert (found["keys"], found["types"]) == (list(header.metadata), list(header.types.values()))
    expected = [[t.name, [str(n) for n in t.shape], t.type, str(t.offset), str(t.size)] for t in header.tensors]
    assert found["tensors"] == expected
    return header


def check_both(adapter: GgufHeader, base: GgufHeader, base_sha256: str) -> None:
    """Gate an adapter here and on the phone."""
    try:
        binding.check_adapter(adapter, base, base_sha256)
    except (FormatError, BaseMismatch):
        with pytest.raises(Refused):
            phone.ask("fits", adapter.path, base.path, base_sha256)
        raise
    phone.ask("fits", adapter.path, base.path, base_sha256)


def attacks() -> dict[str, Any]:
    # A link cannot be planted in a browser's private file system.
    return again("attacks/test_metadata.py", ("test_links_planted_in_the_device_root",), update=update_both)


def formats() -> dict[str, Any]:
    others = (
        "test_files_that_are_no_files_are_refused",  # there are only files
        "test_block_sizes_are_those_of_the_gguf_package",
        "test_it_reads_what_the_gguf_package_reads",  # slow: the real model is read once
        "test_a_changed_real_header_is_read_or_refused",
    )
    found = again("bundle/test_formats.py", others, read_gguf=read_both)
    return {name: value for name, value in found.items() if "safetensors" not in name}


globals().update(attacks() | formats() | again("bundle/test_binding.py", check_adapter=check_both))


# What the board's tests do not ask


@pytest.fixture
def device(tmp_path: Path) -> Path:
    return tmp_path / "device"


def new_root(publisher: Publisher, change: Any, signers: list[Any]) -> None:
    """Publish another version of the root."""
    forger = Forger(publisher.repository, publisher.keys)
    newest = max(publisher.repository.glob("metadata/*.root.json"), key=lambda path: int(path.name.split(".")[0]))
    root = forger._load(newest.name)
    root.signed.version += 1
    change(root.signed)
    root.signatures.clear()
    for signer in signers:
        root.sign(signer, append=True)
    root.to_file(str(publisher.repository / f"metadata/{root.signed.version}.root.json"))


def other_keys(folder: Path) -> Any:
    keys.create(folder)
    return keys.load(folder).signers


@pytest.mark.parametrize("by", ["both", "old", "new", "none"])
def test_a_root_is_rotated_by_its_old_and_its_new_keys(
    publisher: Publisher, server: Server, device: Path, tmp_path: Path, by: str
) -> None:
    publisher.publish(publisher.base())
    update_both(device, server.url, root_json=publisher.root_json)
    old, new = keys.load(publisher.keys).signers["root"], other_keys(tmp_path / "new")["root"]

    def rotate(root: Any) -> None:
        root.revoke_key(old.public_key.keyid, "root")
        root.add_key(new.public_key, "root")

    signers = {"both": [old, new], "old": [old], "new": [new], "none": []}[by]
    new_root(publisher, rotate, signers)
    if by == "both":
        update_both(device, server.url)
        new_root(publisher, lambda root: None, [new])
        update_both(device, server.url)
        # The old key is worth nothing any more.
        new_root(publisher, lambda root: None, [old])
    with pytest.raises(Untrusted):
        update_both(device, server.url)


@pytest.mark.parametrize("signatures", [0, 1, 2])
def test_a_threshold_of_two(
    publisher: Publisher, server: Server, device: Path, tmp_path: Path, signatures: int
) -> None:
    publisher.publish(publisher.base())
    first, second = keys.load(publisher.keys).signers, other_keys(tmp_path / "new")

    def ask_two(root: Any) -> None:
        root.add_key(second["timestamp"].public_key, "timestamp")
        root.roles["timestamp"].threshold = 2

    new_root(publisher, ask_two, [first["root"]])
    forger = Forger(publisher.repository, publisher.keys)
    timestamp = forger.roles["timestamp"]
    timestamp.signatures.clear()
    for signer in (first["timestamp"], second["timestamp"])[:signatures]:
        timestamp.sign(signer, append=True)
    timestamp.to_file(str(publisher.repository / "metadata/timestamp.json"))
    if signatures == 2:
        assert update_both(device, server.url, root_json=publisher.root_json).changed
        return
    with pytest.raises(Untrusted):
        update_both(device, server.url, root_json=publisher.root_json)


def test_one_key_under_two_names_does_not_count_twice(publisher: Publisher, server: Server, device: Path) -> None:
    """Stricter than python-tuf, which trusts a root not to name a key twice."""
    publisher.publish(publisher.base())
    signers = keys.load(publisher.keys).signers
    name = signers["timestamp"].public_key.keyid

    def twice(root: Any) -> None:
        root.keys["other"] = root.keys[name]
        root.roles["timestamp"].keyids.append("other")
        root.roles["timestamp"].threshold = 2

    new_root(publisher, twice, [signers["root"]])
    path = publisher.repository / "metadata/timestamp.json"
    timestamp = json.loads(path.read_bytes())
    timestamp["signatures"] += [timestamp["signatures"][0] | {"keyid": "other"}]
    path.write_text(json.dumps(timestamp))
    with pytest.raises(Refused, match="signed by 1 of its keys, 2 are needed"):
        phone.update(device, server.url, publisher.root_json)


def test_new_keys_after_a_version_nobody_can_reach(publisher: Publisher, server: Server, device: Path) -> None:
    """A stolen timestamp key signed a huge version; the publisher replaces the keys and begins at 1 again."""
    publisher.publish(publisher.base())
    forger = Forger(publisher.repository, publisher.keys)
    before = forger.roles["timestamp"].to_bytes()
    forger.roles["timestamp"].signed.version = 10**9
    forger._sign("timestamp", keys.load(publisher.keys).signers["timestamp"])
    update_both(device, server.url, root_json=publisher.root_json)
    (publisher.repository / "metadata/timestamp.json").write_bytes(before)
    with pytest.raises(Untrusted):
        update_both(device, server.url)
    old, root = keys.load(publisher.keys).signers, keys.load(publisher.keys).signers["root"]
    (publisher.keys / "timestamp.pem").unlink()
    fresh = other_keys(publisher.home / "fresh")["timestamp"]

    def replace_key(signed: Any) -> None:
        signed.revoke_key(old["timestamp"].public_key.keyid, "timestamp")
        signed.add_key(fresh.public_key, "timestamp")

    new_root(publisher, replace_key, [root])
    timestamp = forger._load("timestamp.json")
    timestamp.sign(fresh)
    timestamp.to_file(str(publisher.repository / "metadata/timestamp.json"))
    assert update_both(device, server.url)


def test_a_replay_after_the_phones_metadata_was_lost(publisher: Publisher, server: Server, device: Path) -> None:
    base = publisher.base()
    publisher.publish(base)
    old = (publisher.repository / "metadata/timestamp.json").read_bytes()
    publisher.publish(publisher.adapter(base))
    update_both(device, server.url, root_json=publisher.root_json)
    (publisher.repository / "metadata/timestamp.json").write_bytes(old)
    for path in device.with_name("phone").glob("tuf/*"):
        path.unlink()
    with pytest.raises(Refused, match="someone may be replaying an old copy"):
        phone.update(device.with_name("phone"), server.url, None)


def test_a_release_has_the_same_name_everywhere(publisher: Publisher, server: Server, device: Path) -> None:
    base = publisher.base()
    publisher.publish(base, publisher.adapter(base), publisher.adapter(base, name="7"))
    first = update_both(device, server.url, root_json=publisher.root_json)
    publisher.publish(publisher.adapter(base, seed=2, counter=2))
    assert update_both(device, server.url).release != first.release
    blobs = device.with_name("phone") / "blobs"
    assert (blobs / bundle_of(base).base_sha256).read_bytes() == artifact_of(base).read_bytes()


RULES = ("install", "begin", "confirm", "reject", "untried", "roll_back")


@pytest.mark.parametrize("seed", range(5))
def test_one_state_follows_another_as_on_a_board(phone: Phone, seed: int) -> None:
    choose, state = random.Random(seed), State()
    for _ in range(200):
        rule, release = choose.choice(RULES), choose.choice("abcdef") * 64
        given = (release,) if rule == "install" else ()
        try:
            after = getattr(activation, rule)(state, *given)
        except PitstopError:
            with pytest.raises(Refused):
                phone.ask("follow", asdict(state), rule, release)
            continue
        assert phone.ask("follow", asdict(state), rule, release) == json.loads(json.dumps(asdict(after)))
        state = after


@pytest.mark.parametrize("seed", range(5))
def test_a_floor_rises_as_on_a_board(phone: Phone, seed: int) -> None:
    choose, floor, refused = random.Random(seed), Floor(), 0
    for _ in range(200):
        low = [max(0, number - 1) for number in (floor.root, floor.timestamp, floor.snapshot, floor.issued)]
        root, timestamp, snapshot, issued = (number + choose.randrange(4) for number in low)
        names = tuple(sorted(choose.sample("kl", choose.choice([1, 1, 2]))))
        seen = Seen(root, timestamp, snapshot, names, issued, issued + choose.randrange(-1, 5))
        counters, clock = {choose.choice("ab"): choose.randrange(1, 4)}, float(choose.randrange(3))
        given = json.loads(json.dumps([asdict(floor), asdict(seen), clock, counters]))
        try:
            after = rise_counters(rise(floor, seen, clock), counters)
        except Untrusted:
            refused += 1
            with pytest.raises(Refused):
                phone.ask("rise", *given)
            floor = Floor() if refused % 20 == 0 else floor
            continue
        assert phone.ask("rise", *given) == json.loads(json.dumps(asdict(after)))
        floor = after
    assert 20 < refused < 200


CHARACTERS = 'a"\\\n\x00/é\u2028\ufffd\U0001f600\ue000'


def some_json(choose: random.Random, depth: int) -> Any:
    """Return a value of up to this many levels."""
    kind = choose.randrange(5 if depth else 3)
    if kind == 0:
        return some_text(choose)
    if kind < 3:
        return choose.choice([None, True, False, 0, -1, 7, 2**53 - 1, -(2**53) + 1])
    some = [some_json(choose, depth - 1) for _ in range(choose.randrange(5))]
    return some if kind == 3 else {some_text(choose): value for value in some}


def some_text(choose: random.Random) -> str:
    return "".join(choose.choices(CHARACTERS, k=choose.randrange(6)))


def test_canonical_json_is_that_of_the_publisher(phone: Phone) -> None:
    for seed in range(300):
        value = some_json(random.Random(seed), 4)
        expected = encode_canonical(value)
        assert bytes.fromhex(phone.ask("canonical", json.dumps(value, ensure_ascii=False))).decode() == expected


@pytest.mark.parametrize("text", ["1.5", "[1e400]", '"\\ud800"', "9007199254740993", "[" * 100_000 + "]" * 100_000])
def test_what_has_no_canonical_form(phone: Phone, text: str) -> None:
    with pytest.raises((Refused, AssertionError)):
        phone.ask("canonical", text)


CHANGES: list[dict[str, Any]] = [
    {"kind": "other"}, {"name": "Tiny"}, {"name": ""}, {"version": "1.x"}, {"version": 1}, {"counter": 0},
    {"counter": True}, {"base_sha256": "0"}, {"base_sha256": "0" * 64}, {"artifacts": []}, {"scale": "1"},
    {"more": 1}, {"measured": {"a": "b"}}, {"reports": []}, {"compatible": "any"}, {"prompting": {}}, {"scale": 2},
    {"artifact": {"size": 0}}, {"artifact": {"name": ".."}}, {"artifact": {"name": "a/b"}}, {"artifact": {"more": 1}},
    {"artifact": {"role": "adapter"}}, {"artifact": {"role": "none"}}, {"artifact": {"sha256": "A" * 64}},
    {"artifact": {"pieces": ["0" * 64]}}, {"artifact": {"pieces": []}}, {"artifact": {"size": PIECE + 1}},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_manifest_is_read_as_on_a_board(phone: Phone, publisher: Publisher, change: dict[str, Any]) -> None:
    data = records.to_mapping(bundle_of(publisher.base()))
    data["artifacts"][0].update(change.get("artifact", {}))
    data |= {name: value for name, value in change.items() if name != "artifact"}
    text = json.dumps(data)
    try:
        bundle = check_bundle(records.from_json(Bundle, text.encode()))
    except RecordError:
        with pytest.raises(Refused):
            phone.ask("manifest", text)
        return
    artifact = replace(bundle.artifact, pieces=(bundle.base_sha256,))
    expected = records.to_mapping(replace(bundle, artifacts=(artifact,)))
    assert phone.ask("manifest", text) == expected
