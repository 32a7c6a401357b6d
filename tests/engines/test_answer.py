from hypothesis import given
from hypothesis import strategies as st

from pitstop.engines.answer import StopText, Wording
from pitstop.engines.base import Sampling, Usage

TEXT = st.text(alphabet="abc", max_size=12)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


def passed(parts: list[str], stops: list[str]) -> str:
    stop = StopText(stops)
    return "".join(stop.feed(part) for part in parts) + stop.finish()


@given(st.lists(TEXT), STOPS)
def test_where_the_pieces_end_does_not_matter(parts: list[str], stops: list[str]) -> None:
    whole = "".join(parts)
    found = passed(parts, stops)
    assert found == passed(list(whole), stops) == passed([whole], stops)
    assert whole.startswith(found)
    assert not any(stop in found for stop in stops)
    assert (found == whole) == (not any(stop in whole for stop in stops))


@given(st.lists(TEXT), STOPS)
def test_no_text_is_held_that_cannot_become_a_stop(parts: list[str], stops: list[str]) -> None:
    stop = StopText(stops)
    seen = given_out = ""
    for part in parts:
        seen += part
        given_out += stop.feed(part)
        if not stop.stopped:
            held = seen[len(given_out) :]
            assert held == "" or any(text.startswith(held) for text in stops)


def test_what_was_held_back_comes_with_the_last_piece() -> None:
    texts = {1: "Par", 2: "is, EN", 9: ""}
    usage = Usage()
    sampling = Sampling(stop=("END",))
    wording = Wording(10, sampling, usage, lambda token: "" if token is None else texts[token], (9).__eq__)
    assert [wording.take(token) for token in (1, 2, 9)] == ["Par", "is, ", "EN"]
    assert wording.finished
    assert (usage.completion_tokens, usage.finish_reason) == (3, "stop")


@given(st.integers(0, 5), st.integers(0, 5))
def test_an_answer_ends_at_its_limit_or_where_the_room_does(room: int, asked: int) -> None:
    usage = Usage()
    wording = Wording(room, Sampling(max_tokens=asked), usage, lambda token: "" if token is None else "a", (9).__eq__)
    text = ""
    while not wording.finished:
        text += wording.take(1)
    assert text == "a" * min(room, asked)
    assert usage.finish_reason == "length"
