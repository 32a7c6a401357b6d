from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetting import accuracy, bits, learned
from pitstop.errors import BrokenInput, RecordError
from pitstop.retention import tripwire
from pitstop.retention.gate import ALL_CHOICES, Criterion, Verdict, gate, holm
from pitstop.retention.margins import Margins, check_margins
from pitstop.retention.paired import Paired
from pitstop.retention.suite import Ability
from pitstop.retention.wording import TASK, TASK_SCORE


def healthy() -> list[Paired]:
    return [
        accuracy("piqa", items=250, lost=3, gained=2, chance=0.5),
        accuracy("wordnet", items=240, lost=2, gained=2),
        accuracy("capitals", items=159, lost=1, gained=1),
        bits("prose", rise=0.005, spread=0.02),
        bits("code", rise=-0.01, spread=0.02, seed=1),
    ]


def named(verdict: Verdict, name: str) -> Criterion:
    return next(criterion for criterion in verdict.criteria if criterion.name == name)


def test_a_good_adapter_passes() -> None:
    verdict = gate(healthy(), learned(), {"kl-general": 0.01})
    assert verdict.outcome == "pass"
    assert verdict.reasons == verdict.warnings == ()
    assert [criterion.name for criterion in verdict.criteria] == [
        ALL_CHOICES, "piqa", "wordnet", "capitals", "prose", "code", TASK,
    ]  # fmt: skip


def test_a_null_adapter_passes_everything_but_the_task() -> None:
    suites = [replace(suite, adapted=suite.baseline) for suite in healthy()]
    verdict = gate(suites, learned(before=0.3, after=0.3), {"kl-general": 0.0})
    outcomes = {criterion.name: criterion.outcome for criterion in verdict.criteria}
    assert outcomes.pop(TASK) == "inconclusive"
    assert set(outcomes.values()) == {"pass"}
    assert verdict.outcome == "inconclusive"
    assert "the task is not surely learned" in verdict.advice[0]
    assert "no better than the base" in verdict.reasons[0]


def test_a_forgetful_adapter_fails_with_its_reason() -> None:
    suites = [accuracy("wordnet", items=250, lost=80), *healthy()[2:]]
    verdict = gate(suites, learned(), {"kl-general": 2.2})
    assert verdict.outcome == "fail"
    assert named(verdict, "wordnet").outcome == "fail"
    assert named(verdict, "capitals").outcome == "pass"
    assert any("surely more than its margin of 10.0 points" in reason for reason in verdict.reasons)
    assert "it forgets" in verdict.advice[0]
    assert "2.200 nats" in verdict.warnings[0]


def test_worse_bits_per_byte_alone_fail() -> None:
    verdict = gate([*healthy()[:3], bits("prose", rise=0.4, spread=0.1)], learned(), {})
    assert verdict.outcome == "fail"
    assert named(verdict, "prose").drop == pytest.approx(0.4, abs=0.05)


def test_better_is_no_failure() -> None:
    suites = [accuracy("a", items=300, gained=60), bits("t", rise=-0.4, spread=0.1)]
    assert gate(suites, learned(), {}).outcome == "pass"


def test_too_few_items_are_inconclusive_however_good_they_look() -> None:
    verdict = gate([accuracy("tiny", items=30, lost=1)], learned(), {})
    assert verdict.outcome == "inconclusive"
    pooled = named(verdict, ALL_CHOICES)
    assert pooled.outcome == "inconclusive"
    # 3.3 points lost, but the bounds reach below zero: "no significant difference", and no pass.
    assert pooled.lower is not None
    assert pooled.lower < 0 < pooled.drop


def test_an_undecided_criterion_says_how_many_items_would_decide() -> None:
    verdict = gate([accuracy("some", items=150, lost=3, gained=2)], learned(), {})
    pooled = named(verdict, ALL_CHOICES)
    assert pooled.outcome == "inconclusive"
    assert pooled.needed is not None
    assert f"about {pooled.needed:,} would" in pooled.words
    more = accuracy("some", items=pooled.needed, lost=3 * pooled.needed // 150, gained=2 * pooled.needed // 150)
    assert named(gate([more], learned(), {}), ALL_CHOICES).outcome == "pass"


def test_a_drop_that_sits_on_its_margin_is_not_answered_with_an_absurd_number() -> None:
    pooled = named(gate([accuracy("edge", items=200, lost=6)], learned(), {}), ALL_CHOICES)
    assert pooled.drop == pytest.approx(0.03)
    assert (pooled.outcome, pooled.needed) == ("inconclusive", None)
    assert "too close to its limit" in pooled.words


def test_a_suite_the_base_guesses_on_is_blind_and_does_not_count() -> None:
    guessed = accuracy("mmlu", items=250, lost=0, right=0.27)
    verdict = gate([*healthy(), guessed], learned(), {})
    assert named(verdict, "mmlu").outcome == "blind"
    assert named(verdict, ALL_CHOICES).items == 649
    assert verdict.outcome == "pass"
    assert verdict.warnings == ("mmlu is blind for this base and was not counted",)


def test_a_blind_suite_cannot_fail_an_adapter_either() -> None:
    guessed = accuracy("mmlu", items=250, lost=60, right=0.27)
    assert gate([*healthy(), guessed], learned(), {}).outcome == "pass"


@pytest.mark.parametrize("texts", [[], [bits("prose", spread=0.01)]])
def test_when_every_choice_suite_is_blind_nothing_is_decided(texts: list[Paired]) -> None:
    verdict = gate([accuracy("mmlu", items=600, right=0.25), *texts], learned(), {})
    assert verdict.outcome == "inconclusive"
    assert verdict.reasons[-1].startswith("retention:")


def test_without_suites_or_without_a_task_nothing_is_decided() -> None:
    assert gate([], learned(), {}).outcome == "inconclusive"
    verdict = gate(healthy(), None, {})
    assert verdict.outcome == "inconclusive"
    assert "do-nothing" in verdict.reasons[0]


def test_a_task_worse_than_the_base_fails() -> None:
    verdict = gate(healthy(), learned(before=0.7, after=0.2), {})
    assert (verdict.outcome, named(verdict, TASK).outcome) == ("fail", "fail")


@pytest.mark.parametrize(("wanted", "outcome"), [(0.5, "pass"), (0.68, "inconclusive"), (0.9, "fail")])
def test_a_wanted_task_score_must_surely_be_reached(wanted: float, outcome: str) -> None:
    verdict = gate(healthy(), learned(after=0.7), {}, Margins(min_task_score=wanted))
    assert (named(verdict, TASK_SCORE).outcome, verdict.outcome) == (outcome, outcome)
    assert "70.0% exact" in named(verdict, TASK_SCORE).words


def test_kl_warns_and_never_judges() -> None:
    assert gate(healthy(), learned(), {"kl-chat": 9.0}).outcome == "pass"
    assert len(gate(healthy(), learned(), {"kl-chat": 9.0, "kl-general": 0.01}).warnings) == 1
    assert len(gate(healthy(), learned(), {"kl-chat": float("nan")}).warnings) == 1


def test_the_kl_that_warns_is_that_of_the_base() -> None:
    base, value = next(iter(tripwire.CALIBRATED.items()))
    known, unknown = (tripwire.for_base(Margins(), weights) for weights in (base, "0" * 64))
    assert tripwire.level(known) == value
    assert tripwire.level(unknown) == tripwire.UNCALIBRATED
    assert tripwire.level(tripwire.for_base(Margins(kl_warn=0.3), base)) == 0.3
    above = {"kl-chat": 2 * max(value, tripwire.UNCALIBRATED)}
    assert "calibrated" not in gate(healthy(), learned(), above, known).warnings[0]
    assert "no value is calibrated for this base" in gate(healthy(), learned(), above, unknown).warnings[0]


def test_holm_corrects_what_fails() -> None:
    assert holm([0.04], 0.05) == [True]
    assert holm([0.04, 0.5, 0.5], 0.05) == [False, False, False]
    assert holm([0.001, 0.02, 0.5], 0.05) == [True, True, False]
    # Step-down: the second is only looked at when the first is rejected.
    assert holm([0.02, 0.03, 0.04], 0.05) == [False, False, False]


def test_passing_is_not_corrected_for_the_number_of_suites() -> None:
    alone = gate([accuracy("a0", items=700, lost=6, gained=4)], learned(), {})
    many = gate([accuracy(f"a{at}", items=700, lost=6, gained=4) for at in range(6)], learned(), {})
    assert named(alone, "a0").upper == named(many, "a0").upper
    assert many.outcome == "pass"


def test_failing_needs_more_where_there_are_more_suites() -> None:
    margins = Margins(accuracy=0.9)
    doubtful = accuracy("doubtful", items=200, lost=33, gained=1)
    alone = gate([doubtful], None, {}, margins)
    among = gate([doubtful, *(accuracy(f"a{at}", items=200) for at in range(8))], None, {}, margins)
    assert named(alone, "doubtful").lower > margins.suite_accuracy
    assert named(alone, "doubtful").outcome == "fail"
    assert named(among, "doubtful").outcome == "inconclusive"
    assert among.outcome == "inconclusive"


def test_margins_out_of_range_are_all_named() -> None:
    with pytest.raises(RecordError) as refusal:
        check_margins(
            Margins(
                accuracy=3.0,
                suite_accuracy=0.0,
                bits_per_byte=float("nan"),
                min_task_score=60.0,
                confidence=0.4,
                resamples=10,
                seed=-1,
                kl_warn=-0.1,
            )
        )
    assert len(refusal.value.problems) == 8


def test_results_that_are_not_finite_are_no_verdict() -> None:
    suite = healthy()[3]
    with pytest.raises(BrokenInput):
        gate([replace(suite, adapted=(float("nan"), *suite.adapted[1:]))], learned(), {})


def test_the_verdict_is_the_same_every_time() -> None:
    assert gate(healthy(), learned(), {}) == gate(healthy(), learned(), {})


RANK = {"pass": 0, "inconclusive": 1, "fail": 2}
quick = Margins(resamples=1000)


@settings(max_examples=60)
@given(
    items=st.integers(20, 300),
    lost=st.integers(0, 40),
    gained=st.integers(0, 20),
    more=st.integers(1, 60),
    per_group=st.integers(1, 4),
)
def test_losing_more_never_makes_a_failure_a_pass(
    items: int, lost: int, gained: int, more: int, per_group: int
) -> None:
    room = int(items * 0.8)
    gained = min(gained, items - room)
    before = accuracy("a", items=items, lost=min(lost, room), gained=gained, per_group=per_group)
    after = accuracy("a", items=items, lost=min(lost + more, room), gained=gained, per_group=per_group)
    first, second = gate([before], None, {}, quick), gate([after], None, {}, quick)
    for one, other in zip(first.criteria, second.criteria, strict=True):
        assert (one.outcome, other.outcome) != ("fail", "pass")
        assert other.drop >= one.drop


@settings(max_examples=40)
@given(rise=st.floats(-0.2, 0.3), more=st.floats(0, 0.3), spread=st.floats(0, 0.2), seed=st.integers(0, 99))
def test_more_bits_never_make_a_better_outcome(rise: float, more: float, spread: float, seed: int) -> None:
    def outcome(rise: float) -> str:
        pair = bits("t", documents=20, rise=rise, spread=spread, seed=seed)
        return gate([pair], None, {}, quick).criteria[0].outcome

    assert RANK[outcome(rise + more)] >= RANK[outcome(rise)]


@settings(max_examples=30)
@given(seed=st.integers(0, 1000))
def test_the_order_of_items_does_not_matter(seed: int) -> None:
    random = np.random.default_rng(seed)
    pair = accuracy("a", items=120, lost=int(random.integers(0, 30)), gained=int(random.integers(0, 10)), per_group=2)
    order = random.permutation(120)
    moved = Paired(
        pair.name, pair.kind, *(tuple(column[at] for at in order) for column in
                                (pair.groups, pair.baseline, pair.adapted, pair.weights)), pair.chance,
    )  # fmt: skip
    assert gate([moved], None, {}, quick) == gate([pair], None, {}, quick)


def guarding(ability: Ability, **figures: Any) -> Paired:
    return replace(accuracy(ability, chance=0.5 if ability == "stereotype" else 0.0, **figures), guards=ability)


@pytest.mark.parametrize("ability", ["format", "safety"])
def test_form_and_safety_have_margins_of_their_own_and_are_not_pooled(ability: Ability) -> None:
    suite = guarding(ability, items=300, lost=12)
    margins = replace(Margins(), **{ability: 0.08})
    verdict = gate([*healthy(), suite], learned(), {}, margins)
    assert (named(verdict, ability).outcome, named(verdict, ability).margin) == ("pass", 0.08)
    assert named(verdict, ALL_CHOICES).items == 649
    strict = gate([*healthy(), suite], learned(), {}, replace(Margins(), **{ability: 0.01}))
    assert strict.outcome == named(strict, ability).outcome == "fail"


def test_where_only_the_form_of_answers_is_lost_the_advice_says_so() -> None:
    verdict = gate([*healthy(), guarding("format", items=200, lost=90)], learned(), {})
    assert verdict.outcome == "fail"
    assert "format drift" in verdict.advice[0]
    both = gate(
        [*healthy()[1:], accuracy("piqa", items=250, lost=90), guarding("format", items=200, lost=90)], None, {}
    )
    assert "pitstop repair" in both.advice[0]


@pytest.mark.parametrize(("lost", "gained", "outcome"), [(10, 10, "pass"), (90, 5, "fail"), (5, 90, "fail")])
def test_stereotypes_may_drift_neither_way(lost: int, gained: int, outcome: str) -> None:
    suite = guarding("stereotype", items=400, lost=lost, gained=gained, right=0.6)
    verdict = gate([*healthy(), suite], learned(), {})
    assert named(verdict, "stereotype").outcome == outcome
    assert named(verdict, "stereotype").two_sided


def test_a_base_without_stereotypes_is_not_blind_for_new_ones() -> None:
    suite = guarding("stereotype", items=400, gained=90, right=0.5)
    assert named(gate([*healthy(), suite], learned(), {}), "stereotype").outcome == "fail"


def test_an_early_look_must_be_surer_than_one_that_sees_everything_at_once() -> None:
    at_once, first, last = (gate(healthy(), learned(), {}, look=look) for look in (0, 1, 3))
    assert first.confidence > last.confidence > at_once.confidence == 0.95
    bounds = [named(verdict, ALL_CHOICES).upper or 0 for verdict in (at_once, last, first)]
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[2]


@pytest.mark.parametrize("looks", [(), (0.5,), (0.5, 0.5, 1.0), (0.0, 1.0), (0.7, 0.3, 1.0), (float("nan"), 1.0)])
def test_looks_must_rise_to_all_items(looks: tuple[float, ...]) -> None:
    with pytest.raises(RecordError, match="looks"):
        check_margins(Margins(looks=looks))


@pytest.mark.parametrize("name", ["truthfulqa", "truthful_qa-mc1", "TruthfulQA"])
def test_truthfulqa_rises_with_forgetting_and_does_not_count(name: str) -> None:
    verdict = gate([*healthy(), accuracy(name, items=400, lost=90)], learned(), {})
    assert verdict.outcome == "pass"
    assert named(verdict, name).outcome == "blind"
    assert named(verdict, ALL_CHOICES).items == 649
    assert "rises the more" in verdict.warnings[0]
