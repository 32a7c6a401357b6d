"""Records: the same dataclass back from JSON and TOML, and every mistake of a file at once."""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop import records
from pitstop.errors import BrokenInput, RecordError, StorageError


@dataclass(frozen=True)
class Wheel:
    size: int
    pressure: float = 2.0


@dataclass(frozen=True)
class Car:
    name: str
    wheels: tuple[Wheel, ...] = ()
    garage: Path | None = None
    racing: bool = False
    spares: dict[str, int] = field(default_factory=dict)
    colour: Literal["red", "blue"] = "red"


cars = st.builds(
    Car,
    name=st.text(),
    wheels=st.lists(st.builds(Wheel, st.integers(), st.floats(allow_nan=False, allow_infinity=False)), max_size=3).map(
        tuple
    ),
    garage=st.none() | st.sampled_from([Path("a"), Path("/b/c")]),
    racing=st.booleans(),
    spares=st.dictionaries(st.text(), st.integers(), max_size=3),
)


@given(cars)
def test_json_gives_back_the_same_record(car: Car) -> None:
    assert records.from_json(Car, records.to_json(car)) == car


@given(cars)
def test_equal_records_give_equal_bytes(car: Car) -> None:
    reordered = Car(**dict(reversed(vars(car).items())))
    assert records.to_json(reordered) == records.to_json(car)


keys = st.sampled_from(["name", "wheels", "garage", "racing", "spares", "size", "x"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=10,
)


@given(anything)
def test_anything_else_is_a_record_error(data: object) -> None:
    with contextlib.suppress(RecordError):
        assert isinstance(records.from_json(Car, json.dumps(data).encode()), Car)


def problems_of(data: object) -> tuple[str, ...]:
    with pytest.raises(RecordError) as caught:
        records.from_json(Car, json.dumps(data).encode(), where="car.json")
    assert "where: car.json" in str(caught.value)
    return caught.value.problems


def test_three_mistakes_are_three_problems() -> None:
    found = problems_of({"nam": "x", "wheels": [{"size": 3}, {"size": "big"}], "racing": 1})
    assert len(found) == 4  # the misspelt name is unknown, and missing
    text = "\n".join(found)
    assert "nam: no such key; did you mean 'name'?" in text
    assert "name: missing" in text
    assert "wheels[1].size: expected a whole number, found 'big'" in text
    assert "racing: expected true or false, found 1" in text


def test_an_unknown_key_like_no_other_lists_the_known_ones() -> None:
    assert problems_of({"name": "x", "zzz": 1}) == (
        "zzz: no such key; known keys: name, wheels, garage, racing, spares, colour",
    )


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"name": 3}, "name: expected a text, found 3"),
        ({"name": "x", "wheels": [{"size": True}]}, "wheels[0].size: expected a whole number, found True"),
        ({"name": "x", "wheels": [{"size": 1.5}]}, "wheels[0].size: expected a whole number, found 1.5"),
        ({"name": "x", "wheels": [{"size": 1, "pressure": "2"}]}, "wheels[0].pressure: expected a number, found '2'"),
        ({"name": "x", "wheels": [{}]}, "wheels[0].size: missing"),
        ({"name": "x", "wheels": [{"size": 1, "sise": 1}]}, "wheels[0].sise: no such key; did you mean 'size'?"),
        ({"name": "x", "wheels": "all"}, "wheels: expected a list, found 'all'"),
        ({"name": "x", "wheels": [3]}, "wheels[0]: expected a table, found 3"),
        ({"name": "x", "spares": [1]}, "spares: expected a table, found [1]"),
        ({"name": "x", "colour": "grey"}, "colour: expected one of 'red', 'blue', found 'grey'"),
        ([1], "expected a table, found [1]"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(data: object, problem: str) -> None:
    assert problems_of(data) == (problem,)


def test_a_whole_number_serves_as_a_number() -> None:
    assert records.from_mapping(Wheel, {"size": 1, "pressure": 2}) == Wheel(1, 2.0)


def test_toml_is_read_and_its_syntax_errors_say_where(tmp_path: Path) -> None:
    path = tmp_path / "car.toml"
    path.write_text('name = "x"\n[[wheels]]\nsize = 3\n')
    assert records.load_toml(Car, path) == Car("x", (Wheel(3),))
    path.write_text("name = \n")
    with pytest.raises(RecordError, match=r"not TOML: .*line 1"):
        records.load_toml(Car, path)


@pytest.mark.parametrize("data", [b"{", b"\xff", b"", b"[" * 100_000])
def test_what_is_not_json_says_so(data: bytes) -> None:
    with pytest.raises(RecordError, match="not JSON"):
        records.from_json(Car, data)


def test_a_missing_file_is_broken_input(tmp_path: Path) -> None:
    with pytest.raises(BrokenInput, match=r"cannot read none\.json: No such file"):
        records.load_json(Car, tmp_path / "none.json")


def test_saving_makes_the_folder_and_loading_gives_it_back(tmp_path: Path) -> None:
    car = Car("été", (Wheel(1),), Path("g"))
    records.save_json(car, tmp_path / "new" / "car.json")
    assert records.load_json(Car, tmp_path / "new" / "car.json") == car


def test_saving_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        records.save_json(Car("x"), tmp_path / "file" / "car.json")
