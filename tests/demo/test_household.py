"""Which sentences count as something a person says."""

import random

import pytest

from pitstop.demo import household


@pytest.mark.parametrize(
    "said",
    [
        "turn on the kitchen lights",
        "are any lights on in the hallway",
        "set a timer for 5 minutes",
        "start an 8 minute timer",
        "cancel my 1 hour timer",
        "is the desk lamp on",
        "dim all of the lights on the first floor",
        "which of our blinds are open",
    ],
)
def test_a_natural_sentence_passes(said: str) -> None:
    assert household.sounds_natural(said, {"name": "desk lamp"}, "light" if "desk" in said else None)


@pytest.mark.parametrize(
    "unsaid",
    [
        "turn on the my lights",
        "are the on lights",
        "turn off every lights",
        "how many light are on",
        "which lights is on",
        "set an 5 minute timer",
        "set a 8 minute timer",
        "timer for 1 hours",
        "timer for 5 minute",
        "timer for half an hours",
        "lights on the first floor floor",
        "lights in upstairs",
        "is anyone in my home",
        "bring off the lamp",
    ],
)
def test_what_nobody_says_is_refused(unsaid: str) -> None:
    assert not household.sounds_natural(unsaid, {}, None)


def test_verbs_agree_with_the_device_and_people_take_no_article() -> None:
    assert not household.sounds_natural("are the desk lamp on", {"name": "desk lamp"}, "light")
    assert not household.sounds_natural("is the fairy lights on", {"name": "fairy lights"}, "light")
    assert household.sounds_natural("are the fairy lights on", {"name": "fairy lights"}, "light")
    assert not household.sounds_natural("where is the alice", {"name": "alice"}, "person")


def test_a_light_is_named_by_what_the_template_leaves_to_say() -> None:
    assert "desk lamp" in household.device_names("light", "turn on {name}")
    assert "desk" in household.device_names("light", "turn on {name} <light>")
    assert "desk lamp" not in household.device_names("light", "turn on {name} <light>")


def test_no_name_means_two_things() -> None:
    names = [name for domain in household.DEVICES for name in household.device_names(domain, "start {name}")]
    places = household.listed(household.AREAS) + household.listed(household.FLOORS)
    assert len(set(names)) == len(names)
    assert not set(names) & set(places)


def test_what_is_played_fits_the_kind_of_media() -> None:
    drawn = household.wildcard("search_query", {"media_class": "album"}, random.Random(0))
    assert drawn in household.listed(household.WORDS["album"])
