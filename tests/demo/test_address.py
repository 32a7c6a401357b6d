"""The address dataset, from the source package of usaddress."""

import io
import json
import tarfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pitstop.demo import address, dataset
from pitstop.errors import BrokenInput
from pitstop.packages import fetch


@pytest.fixture(scope="module")
def sdist() -> Path:
    try:
        return fetch(address.SDIST)
    except BrokenInput as error:
        pytest.skip(f"the usaddress source package cannot be fetched: {error.what}")


def packed(folder: Path, xml: str) -> Path:
    path = folder / "made.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(address.LABELLED)
        member.size = len(xml.encode())
        archive.addfile(member, io.BytesIO(xml.encode()))
    return path


def test_two_builds_are_equal_and_the_second_is_skipped_when_whole(sdist: Path, tmp_path: Path) -> None:
    card = address.build(tmp_path / "a")
    address.build(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    before = (tmp_path / "a" / dataset.CARD).stat().st_mtime_ns
    assert address.build(tmp_path / "a") == card
    assert (tmp_path / "a" / dataset.CARD).stat().st_mtime_ns == before


def test_no_address_is_in_two_splits(sdist: Path) -> None:
    splits = address.split(address.rows(sdist))
    assert 1000 <= len(splits["train"]) <= 1200
    assert len(splits["valid"]) >= 100
    assert len(splits["test"]) >= 100
    for key in ("prompt", "group", "id"):
        values = {split: {getattr(row, key) for row in rows} for split, rows in splits.items()}
        assert sum(map(len, values.values())) == len(set.union(*values.values()))


def test_every_field_is_copied_from_the_text_and_no_recipient_is_kept(sdist: Path) -> None:
    for row in address.rows(sdist):
        record = json.loads(row.completion)
        assert record
        assert "Recipient" not in record
        for value in record.values():
            assert value in row.prompt or all(word in row.prompt for word in value.split())


def test_tags_are_joined_as_usaddress_does() -> None:
    tokens = [("AddressNumber", "3"), ("StreetName", "Huer"), ("StreetName", "Huero"), ("StreetNamePostType", "Road,")]
    assert address.joined(tokens) == {"AddressNumber": "3", "StreetName": "Huer Huero", "StreetNamePostType": "Road"}


def test_the_second_street_of_a_crossing_has_its_own_name() -> None:
    tokens = [("StreetName", "12th"), ("IntersectionSeparator", "&"), ("StreetName", "Millard")]
    assert address.joined(tokens) == {
        "StreetName": "12th",
        "IntersectionSeparator": "&",
        "SecondStreetName": "Millard",
    }


def test_a_tag_that_comes_back_is_refused() -> None:
    assert address.joined([("OccupancyType", "Apt."), ("OccupancyIdentifier", "3"), ("OccupancyType", "Flr.")]) is None


def test_spellings_of_one_address_share_a_group(tmp_path: Path) -> None:
    spelt = [
        "<AddressString><AddressNumber>5</AddressNumber> <StreetName>Elm</StreetName></AddressString>",
        "<AddressString><AddressNumber>5</AddressNumber>  <StreetName>ELM,</StreetName></AddressString>",
        "<AddressString><AddressNumber>5</AddressNumber> <StreetName>Elm</StreetName> <ZipCode>60604</ZipCode>"
        "</AddressString>",
        "<AddressString><Recipient>Jo</Recipient> <AddressNumber>6</AddressNumber></AddressString>",
    ]
    found = list(address.rows(packed(tmp_path, f"<AddressCollection>{''.join(spelt)}</AddressCollection>")))
    assert [row.prompt for row in found] == ["5 Elm", "5 Elm 60604"]  # the second differs in punctuation and case only
    assert {row.group for row in found} == {"5 elm"}


def test_an_external_entity_is_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("12 Hidden Way")
    xml = (
        f'<!DOCTYPE a [<!ENTITY x SYSTEM "{secret.as_uri()}">]>'
        "<a><AddressString><StreetName>&x;</StreetName></AddressString></a>"
    )
    with pytest.raises(ET.ParseError):
        list(address.rows(packed(tmp_path, xml)))
