"""What of a prompt a session need not read: it holds it, another one does, or it was parked."""

from collections.abc import Iterable, Sequence

from pitstop.engines.llama.lanes import Lane
from pitstop.engines.llama.streams import LlamaStream
from pitstop.engines.parking import Parking
from pitstop.engines.sessions import COPY_WORTH, Place, Session, Tag, common_prefix


class Beginnings:
    """Brings what has been computed already into sessions, and parks what leaves them."""

    def __init__(self, parking: Parking) -> None:
        self.parking = parking
        self.steady = False  # what was before is not used, see `begin_steadily`

    def begin_steadily(self, lanes: Iterable[Lane]) -> None:
        """Let what comes be evaluated in the same portions whatever was before.

        Batches are measured, and compared item by item: on a base whose activations are rounded to int8, other portions
        change one greedy answer of four.
        """
        self.steady = True
        for lane in lanes:
            if not lane.sessions.busy:
                for session in lane.sessions:
                    lane.empty(session)
                lane.sessions.restart()

    def bring_in(self, lane: Lane, place: Place, tag: Tag, tokens: Sequence[int]) -> int:
        """Let a session hold as much of a prompt as there is anywhere, and return how many tokens that is."""
        session, context = place.session, lane.context
        if place.displaces and not self.steady:
            self.park(lane, session)
        held = max(place.common, place.lent)
        common, parked = (0, None) if self.steady else self.parking.longest(tag, tokens)
        if parked is not None and common - held >= COPY_WORTH:
            state = self.parking.take(parked)
            held = common if state is not None and context.restore(session.sequence, state) else 0
        elif place.donor is not None:
            context.copy(place.donor.sequence, session.sequence)
        # The last token is always evaluated: the logits that choose the next one must be of this request.
        kept = context.cut(session.sequence, min(held, len(tokens) - 1))
        session.tag, session.tokens = tag, list(tokens[:kept])
        return kept

    def catch_up(self, stream: LlamaStream) -> None:
        """Take over what another answer has read for both."""
        reader, stream.behind = stream.behind, None
        assert reader is not None
        held = len(stream.session.tokens)
        lent = common_prefix(reader.session, stream.tag, stream.prompt)
        if lent - held >= COPY_WORTH:
            place = Place(stream.session, displaces=False, common=held, donor=reader.session, lent=lent)
            kept = self.bring_in(stream.lane, place, stream.tag, stream.prompt)
            stream.usage.reused_tokens, stream.waiting = kept, stream.prompt[kept:]

    def park(self, lane: Lane, session: Session) -> None:
        """Keep what a session holds, if there is room and reading it again would take longer than that."""
        if session.tag is None or len(session.tokens) < COPY_WORTH:
            return
        if self.parking.has_room(lane.context.state_size(session.sequence)):
            self.parking.put(session.tag, session.tokens, lane.context.state(session.sequence))
