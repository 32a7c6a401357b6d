from dataclasses import replace

import pytest

from pitstop.retention.gate import ALL_CHOICES, gate
from pitstop.retention.margins import Margins
from pitstop.retention.paired import Paired
from pitstop.retention.plan import Shortage, shortages
from pitstop.retention.suite import ChoiceItem, Suite, TextItem, make


def choices(count: int, *, per_group: int = 1, name: str = "words") -> Suite:
    items = [ChoiceItem(f"{at}", f"{at // per_group}", f"Q {at}", ("a", "b"), 0) for at in range(count)]
    return make(name, "choice", items, license="x", source="x", description="x")


def texts(count: int) -> Suite:
    items = [TextItem(f"{at}", f"{at}", f"Some text {at}.") for at in range(count)]
    return make("prose", "text", items, license="x", source="x", description="x")


def by_name(found: list[Shortage]) -> dict[str, Shortage]:
    return {shortage.name: shortage for shortage in found}


def test_enough_items_are_no_shortage() -> None:
    assert shortages([choices(1000), texts(60)], Margins()) == []


@pytest.mark.parametrize("per_group", [1, 4])
def test_the_number_needed_is_what_the_gate_then_passes_with(per_group: int) -> None:
    margins = Margins(looks=(1.0,), suite_accuracy=0.05)
    shortage = by_name(shortages([choices(40, per_group=per_group)], margins))["words"]
    assert shortage.hopeless
    assert f"{shortage.needed:,} are needed" in shortage.words
    for items, outcome in ((shortage.needed, "pass"), (shortage.needed * 9 // 10, "inconclusive")):
        groups = tuple(str(at // per_group) for at in range(items))
        perfect = Paired("words", "choice", groups, (1.0,) * items, (1.0,) * items, (1.0,) * items, 0.5)
        verdict = gate([perfect], None, {}, replace(margins, accuracy=0.5))
        assert next(one for one in verdict.criteria if one.name == "words").outcome == outcome


def test_what_might_stay_undecided_is_said_too() -> None:
    found = by_name(shortages([choices(300)], Margins()))
    assert list(found) == [ALL_CHOICES]
    assert not found[ALL_CHOICES].hopeless
    assert 350 < found[ALL_CHOICES].needed < 450
    assert "often stay undecided" in found[ALL_CHOICES].words


def test_a_handful_of_texts_cannot_be_judged() -> None:
    found = by_name(shortages([choices(1000), texts(5)], Margins()))
    assert found["prose"].hopeless
    assert found["prose"].needed == 10
