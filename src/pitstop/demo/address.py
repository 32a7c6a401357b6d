"""The address dataset: a US address as people write it, and its parts as JSON, labelled by hand.

The rows are the training data of the usaddress parser (MIT). Its source package holds them, the wheel does not.
"""

import hashlib
import re
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from pitstop.demo import dataset
from pitstop.demo.dataset import DatasetCard, Row
from pitstop.packages import Pinned, fetch

SDIST = Pinned(
    "usaddress==0.5.16",
    "usaddress-0.5.16.tar.gz",
    "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
    source=True,
)
LABELLED = "usaddress-0.5.16/training/labeled.xml"
TEST, VALID = 100, 100  # of 1000 addresses
SPLIT_RULE = (
    f"by address (house number and street, else the whole text): sha256 % 1000 < {TEST} is test, "
    f"the next {VALID} valid, the rest train"
)

Token = tuple[str, str]  # (tag, word)


def build(folder: Path) -> DatasetCard:
    """Write the address dataset into a folder, the same bytes every time, and return its card.

    Raises:
        BrokenInput: pip cannot get the source package.
        Untrusted: the index served another one.
        StorageError: the disk refused.
    """
    source = [f"{SDIST.requirement} sha256:{SDIST.sha256} {LABELLED}"]
    code = dataset.builder_digest(__file__)
    if (card := dataset.finished(folder, code, source)) is not None:
        return card
    return dataset.write(
        folder,
        split(rows(fetch(SDIST))),
        name="address",
        description="US addresses to JSON records, labelled by hand by the usaddress project; none names a recipient",
        licence="MIT",
        source=source,
        builder=code,
        seed=0,  # nothing is drawn
        split_rule=SPLIT_RULE,
    )


def rows(sdist: Path) -> Iterator[Row]:
    """Read the labelled addresses out of the source package, each once, without those that name a person or company."""
    seen: set[str] = set()
    for text, tokens in labelled(sdist):
        record = None if any(tag == "Recipient" for tag, _ in tokens) else joined(tokens)
        if record is None or letters(text) in seen:
            continue
        seen.add(letters(text))
        digest = hashlib.sha256(text.encode()).hexdigest()
        yield Row(f"address-{digest[:12]}", text, dataset.compact(record), group_of(text, record))


def labelled(sdist: Path) -> Iterator[tuple[str, list[Token]]]:
    """Yield every address text with its labelled words, read in memory (the package's digest was checked)."""
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(LABELLED)
        assert member is not None, LABELLED
        root = ET.parse(member).getroot()
    for address in root:
        words = [(part.tag, part.text or "", part.tail or "") for part in address]
        text = "".join(word + gap for _, word, gap in words)
        yield " ".join(text.split()), [(tag, word) for tag, word, _ in words]


def joined(tokens: list[Token]) -> dict[str, str] | None:
    """Join the words of each tag as ``usaddress.tag`` does; None where it would refuse, a tag that comes back later."""
    parts: dict[str, list[str]] = {}
    last, crossing = "", False
    for tag, word in tokens:
        crossing = crossing or tag == "IntersectionSeparator"
        name = f"Second{tag}" if crossing and "StreetName" in tag else tag
        if name in parts and name != last:
            return None
        parts.setdefault(name, []).append(word)
        last = name
    return {name: " ".join(words).strip(" ,;") for name, words in parts.items()}


def group_of(text: str, record: dict[str, str]) -> str:
    """Return what one address shares with its other spellings: house number and street, else its letters and digits."""
    if "AddressNumber" in record and "StreetName" in record:
        return f"{letters(record['AddressNumber'])} {letters(record['StreetName'])}"
    return letters(text)


def letters(text: str) -> str:
    """Return only the letters and digits, in lower case: spelling without punctuation."""
    return re.sub(r"[\W_]+", "", text).casefold()


def split(found: Iterator[Row]) -> dict[str, list[Row]]:
    """Sort rows into splits by their group."""
    splits: dict[str, list[Row]] = {name: [] for name in dataset.SPLITS}
    for row in sorted(found, key=lambda row: row.id):
        place = int(hashlib.sha256(row.group.encode()).hexdigest(), 16) % 1000
        splits["test" if place < TEST else "valid" if place < TEST + VALID else "train"].append(row)
    return splits
