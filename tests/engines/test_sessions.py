import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.engines.sessions import BASE_TAG, COPY_WORTH, Session, Sessions, Tag, common_prefix
from pitstop.errors import Busy

ONE = Tag((("one", 1, 1.0),))


def tag(name: str, generation: int, scale: float) -> Tag:
    return Tag(((name, generation, scale),))


def take(sessions: Sessions, tag: Tag, tokens: list[int]) -> tuple[Session, int]:
    place = sessions.take(tag, tokens)
    return place.session, place.common


def hold(sessions: Sessions, tag: Tag, tokens: list[int]) -> int:
    """Make a session hold exactly these tokens, as an engine does; return its sequence."""
    session, _ = take(sessions, tag, tokens)
    session.tag, session.tokens, session.busy = tag, list(tokens), False
    return session.sequence


def test_a_conversation_is_continued_under_its_own_tag_only() -> None:
    sessions = Sessions(4)
    sequence = hold(sessions, ONE, [1, 2, 3])
    for other_tag in (BASE_TAG, tag("two", 2, 1.0), tag("one", 2, 1.0), tag("one", 1, 0.5)):
        other, common = take(sessions, other_tag, [1, 2, 3, 4])
        assert (other.sequence != sequence, common) == (True, 0)
        other.busy = False
    session, common = take(sessions, ONE, [1, 2, 3, 4])
    assert (session.sequence, common) == (sequence, 3)


def test_the_longest_common_prefix_wins() -> None:
    sessions = Sessions(3)
    hold(sessions, ONE, [1, 2])
    longest = hold(sessions, ONE, [1, 3, 4, 5])
    session, common = take(sessions, ONE, [1, 3, 4, 5, 6])
    assert (session.sequence, common) == (longest, 4)


def test_a_new_conversation_leaves_an_old_one_with_the_same_system_message_alone() -> None:
    sessions = Sessions(2)
    system = [1, 2, 3]
    old = hold(sessions, ONE, [*system, *range(10, 30)])
    new = hold(sessions, ONE, [*system, 40, 41])
    assert new != old
    assert take(sessions, ONE, [*system, *range(10, 30), 50])[0].sequence == old


def test_a_prompt_asked_again_is_found_whatever_was_answered() -> None:
    sessions = Sessions(2)
    sequence = hold(sessions, ONE, [1, 2, *range(10, 30)])
    session, common = take(sessions, ONE, [1, 2])
    assert (session.sequence, common) == (sequence, 2)


def test_the_least_recently_used_goes_when_all_are_taken() -> None:
    sessions = Sessions(2)
    first, second = hold(sessions, ONE, [1]), hold(sessions, ONE, [2])
    assert hold(sessions, ONE, [1]) == first
    assert hold(sessions, ONE, [3]) == second


def test_an_evicted_session_still_gives_what_is_common() -> None:
    sessions = Sessions(1)
    hold(sessions, ONE, [1, 2, 3, 4, 5, 6, 7, 8])
    assert take(sessions, ONE, [1, 2, 9])[1] == 2


def test_a_session_in_use_is_never_handed_out() -> None:
    sessions = Sessions(2)
    first, _ = take(sessions, ONE, [1])
    second, _ = take(sessions, ONE, [1])
    assert first is not second
    with pytest.raises(Busy, match="all 2 conversations"):
        sessions.take(ONE, [1])


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_common_prefix_is_common_and_longest(ours: list[int], theirs: list[int]) -> None:
    session, _ = take(Sessions(1), ONE, [])
    session.tag, session.tokens = ONE, ours
    length = common_prefix(session, ONE, theirs)
    assert ours[:length] == theirs[:length]
    assert length == min(len(ours), len(theirs)) or ours[length] != theirs[length]
    assert common_prefix(session, BASE_TAG, theirs) == 0


def test_a_long_beginning_is_copied_from_a_session_of_the_same_tag() -> None:
    sessions = Sessions(3)
    system = list(range(100, 100 + COPY_WORTH))
    old = hold(sessions, ONE, [*system, *range(2 * COPY_WORTH)])
    place = sessions.take(ONE, [*system, 7, 8])
    assert place.session.sequence != old
    assert place.donor is not None
    assert (place.donor.sequence, place.lent, place.common) == (old, COPY_WORTH, 0)
    assert sessions.take(BASE_TAG, [*system, 7, 8]).donor is None, "never across tags"


def test_a_short_beginning_is_evaluated_again() -> None:
    sessions = Sessions(2)
    hold(sessions, ONE, [*range(COPY_WORTH - 1), *range(500, 700)])
    assert sessions.take(ONE, [*range(COPY_WORTH - 1), 1]).donor is None
