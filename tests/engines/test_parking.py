"""Parked conversations: within their budgets, found by tag and tokens, gone with their adapter."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.engines.parking import Parking
from pitstop.engines.sessions import BASE_TAG, Tag

ALPHA, BETA = Tag((("alpha", 1, 1.0),)), Tag((("beta", 2, 1.0),))

Park = Callable[..., Parking]


def state(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@pytest.fixture
def park() -> Iterator[Park]:
    """Make a parking that is cleared at the end."""
    made: list[Parking] = []

    def make(*args: int, **kwargs: object) -> Parking:
        made.append(Parking(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for parking in made:
        parking.clear()


def test_the_longest_conversation_of_the_same_tag_is_found(park: Park) -> None:
    parking = park(memory=100)
    parking.put(ALPHA, [1, 2], state(10))
    parking.put(ALPHA, [1, 2, 3, 4], state(10, seed=1))
    parking.put(BETA, [1, 2, 3, 4, 5, 6], state(10))
    common, parked = parking.longest(ALPHA, [1, 2, 3, 9])
    assert common == 3
    assert parked is not None
    assert np.array_equal(parking.take(parked), state(10, seed=1))
    assert len(parking) == 2
    assert parking.longest(BASE_TAG, [1, 2, 3]) == (0, None)


@pytest.mark.parametrize("memory", [0, 100])
def test_what_comes_from_disk_is_what_was_parked(park: Park, tmp_path: Path, memory: int) -> None:
    parking = park(memory, disk=1000, folder=tmp_path / "parked")
    for seed in range(5):
        parking.put(ALPHA, [seed], state(60, seed))
    assert parking.bytes_in_memory == min(memory // 60, 1) * 60
    for seed in range(5):
        _, parked = parking.longest(ALPHA, [seed])
        assert parked is not None
        assert np.array_equal(parking.take(parked), state(60, seed))
    assert parking.bytes_in_memory == parking.bytes_on_disk == 0


def test_nothing_parked_has_a_name_on_disk(park: Park, tmp_path: Path) -> None:
    parking = park(disk=1000, folder=tmp_path)
    parking.put(ALPHA, [1], state(60))
    assert parking.bytes_on_disk == 60
    assert list(tmp_path.iterdir()) == []  # so nothing is left of it however the process ends


def test_what_the_disk_damaged_does_not_come_back(park: Park, tmp_path: Path) -> None:
    parking = park(disk=1000, folder=tmp_path)
    parking.put(ALPHA, [1], state(60))
    _, parked = parking.longest(ALPHA, [1])
    assert parked is not None
    assert parked.file is not None
    parked.file.seek(30)
    parked.file.write(bytes([state(60)[30] ^ 1]))
    assert parking.take(parked) is None
    assert len(parking) == 0


def test_a_disk_without_room_costs_the_conversation_only(park: Park, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    parking = park(disk=1000, folder=tmp_path / "file")
    parking.put(ALPHA, [1], state(60))
    assert len(parking) == 0


def test_an_adapter_takes_its_conversations_with_it(park: Park) -> None:
    parking = park(memory=100)
    parking.put(ALPHA, [1], state(10))
    parking.put(BETA, [1], state(10))
    parking.put(Tag((*ALPHA.adapters, *BETA.adapters)), [1], state(10))
    parking.drop("alpha")
    assert len(parking) == 1
    assert parking.longest(BETA, [1])[0] == 1


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(0, 100), st.integers(0, 100))
def test_budgets_hold_and_the_last_ones_stay(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], memory: int, disk: int
) -> None:
    parking = Parking(memory, disk, tmp_path_factory.mktemp("parked"))
    for index, size in enumerate(sizes):
        parking.put(ALPHA, [index], state(size))
        assert parking.bytes_in_memory <= memory
        assert parking.bytes_on_disk <= disk
        assert (parking.longest(ALPHA, [index])[0] == 1) == (size <= max(memory, disk)) or size > memory
    parking.clear()
    assert len(parking) == 0
