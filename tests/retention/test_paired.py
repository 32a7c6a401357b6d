import math
from dataclasses import replace

import numpy as np
import pytest

from forgetting import accuracy, bits
from pitstop.errors import BrokenInput
from pitstop.retention.paired import Drop, Paired, _resampled_counts, check_paired


def drop(*pairs: Paired, resamples: int = 2000) -> Drop:
    return Drop(pairs, resamples=resamples, seed=0)


def test_the_drop_of_an_accuracy_is_base_less_adapted() -> None:
    assert drop(accuracy("a", items=100, lost=6, gained=2)).value == pytest.approx(0.04)


def test_the_drop_of_bits_per_byte_is_adapted_less_base_and_weighs_bytes() -> None:
    pair = Paired("t", "text", ("a", "b"), (100.0, 100.0), (110.0, 100.0), (10.0, 90.0))
    assert drop(pair).value == pytest.approx(0.1)
    assert pair.score == (2.0, 2.1)


def test_no_flip_at_all_still_leaves_a_width() -> None:
    # Tango's bound is Wilson's here: z^2 / (n + z^2).
    found = drop(accuracy("a", items=250))
    assert found.upper(0.95) == pytest.approx(2.7055 / 252.7055, abs=1e-4)
    assert found.lower(0.95) == pytest.approx(-2.7055 / 252.7055, abs=1e-4)


def test_the_score_interval_is_tangos() -> None:
    # At its own bounds the score statistic is z. By hand for 14 lost of 44 and none gained, against 0.2: the nuisance
    # parameter is 0, the variance 44 * 0.2 * 0.8.
    found = drop(accuracy("a", items=44, lost=14, right=1.0))
    assert found._tango(0.2) == pytest.approx((14 - 44 * 0.2) / math.sqrt(44 * 0.2 * 0.8), rel=1e-9)
    # None gained: one proportion, so the bounds are Wilson's.
    z, share, n = 1.6449, 14 / 44, 44
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert found.lower(0.95) <= middle - half + 1e-3
    assert found.upper(0.95) == pytest.approx(middle + half, abs=1e-3)


def test_items_that_move_as_one_group_count_once() -> None:
    alone = drop(accuracy("a", items=300)).upper(0.95)
    grouped = drop(accuracy("a", items=300, per_group=5)).upper(0.95)
    assert alone is not None
    assert grouped is not None
    assert grouped == pytest.approx(2.7055 / (60 + 2.7055), abs=1e-4)
    assert grouped > 4 * alone


def test_too_few_groups_have_no_bounds() -> None:
    few = drop(accuracy("a", items=100, lost=50, per_group=12))
    assert (few.groups, few.upper(0.95), few.lower(0.95), few.p_above(0.1)) == (9, None, None, 1.0)


def test_text_that_did_not_change_has_no_drop_and_no_width() -> None:
    same = drop(bits("t"))
    assert (same.value, same.lower(0.95), same.upper(0.95)) == (0.0, 0.0, 0.0)


def test_one_document_that_changed_among_many_that_did_not_has_no_upper_bound() -> None:
    pair = bits("t", documents=30)
    changed = replace(pair, adapted=(pair.adapted[0] * 2, *pair.adapted[1:]))
    assert drop(changed).upper(0.95) is None


def test_counts_of_kinds_are_resampled_as_groups_drawn_one_by_one_are() -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(1, 4, size=60).astype(float)
    lost = np.array([float(random.integers(-size, size + 1)) for size in sizes])
    strata = [(lost, sizes), (random.integers(-1, 2, size=90).astype(float), np.ones(90))]
    counted = _resampled_counts(np.random.default_rng(1), strata, 20_000)
    drawn = [random.integers(len(sums), size=(20_000, len(sums))) for sums, _ in strata]
    sums = sum(one[index].sum(axis=1) for (one, _), index in zip(strata, drawn, strict=True))
    weights = sum(one[index].sum(axis=1) for (_, one), index in zip(strata, drawn, strict=True))
    at = (0.025, 0.25, 0.5, 0.75, 0.975)
    wanted = np.quantile(sums / weights, at)
    np.testing.assert_allclose(np.quantile(counted, at), wanted, atol=0.03 * (wanted[-1] - wanted[0]))


def test_the_p_value_agrees_with_the_lower_bound() -> None:
    for pair in (accuracy("a", items=200, lost=30, gained=4), bits("t", rise=0.06, spread=0.1)):
        found = drop(pair)
        low = found.lower(0.95)
        assert low is not None
        assert found.p_above(low - 0.004) < 0.05 < found.p_above(low + 0.004)


def test_neither_the_order_of_items_nor_the_names_of_groups_matter() -> None:
    random = np.random.default_rng(3)
    for pair in (accuracy("a", items=90, lost=9, gained=3, per_group=3), bits("t", spread=0.1)):
        order = random.permutation(len(pair.groups))
        moved = Paired(
            pair.name,
            pair.kind,
            tuple(f"other {pair.groups[at]}" for at in order),
            tuple(pair.baseline[at] for at in order),
            tuple(pair.adapted[at] for at in order),
            tuple(pair.weights[at] for at in order),
        )
        assert drop(moved).upper(0.95) == pytest.approx(drop(pair).upper(0.95), rel=1e-12)
        assert drop(moved).lower(0.95) == pytest.approx(drop(pair).lower(0.95), rel=1e-12)


@pytest.mark.parametrize(
    "broken",
    [
        replace(bits("t"), groups=()),
        replace(bits("t"), adapted=(math.nan,) * 60),
        replace(bits("t"), weights=(0.0,) * 60),
        replace(accuracy("a", items=20), adapted=(0.5,) * 20),
        Paired("none", "choice", (), (), (), ()),
    ],
)
def test_figures_that_cannot_be_judged_are_refused(broken: Paired) -> None:
    with pytest.raises(BrokenInput):
        check_paired(broken)


def _simulated(random: np.random.Generator, items: int, delta: float, churn: float) -> Paired:
    draw = random.random(items)
    lost, gained = (churn + delta) / 2, (churn - delta) / 2
    change = np.where(draw < lost, 1.0, np.where(draw < lost + gained, -1.0, 0.0))
    base = np.where(change == -1.0, 0.0, 1.0)
    return Paired("s", "choice", tuple(map(str, range(items))), tuple(base), tuple(base - change), (1.0,) * items, 0.25)


@pytest.mark.parametrize(("items", "margin", "churn"), [(100, 0.10, 0.2), (250, 0.10, 0.12), (650, 0.03, 0.06)])
def test_an_adapter_at_the_margin_passes_at_most_once_in_twenty(items: int, margin: float, churn: float) -> None:
    random = np.random.default_rng(1)
    tries = 400
    bounds = []
    for _ in range(tries):
        found = Drop((_simulated(random, items, margin, churn),), resamples=1000, seed=0)
        bounds.append((found.lower(0.95) or 0.0, found.upper(0.95) or 1.0))
    slack = 3 * math.sqrt(0.05 * 0.95 / tries)
    assert np.mean([upper < margin for _, upper in bounds]) <= 0.05 + slack
    assert np.mean([lower > margin for lower, _ in bounds]) <= 0.05 + slack


def test_a_harmless_adapter_usually_passes() -> None:
    random = np.random.default_rng(2)
    bounds = [Drop((_simulated(random, 650, 0.0, 0.06),), resamples=1000, seed=0).upper(0.95) for _ in range(200)]
    assert np.mean([bound is not None and bound < 0.03 for bound in bounds]) > 0.85


def test_text_at_the_margin_passes_at_most_once_in_twenty() -> None:
    tries = 400
    bounds = [
        Drop((bits("t", documents=30, rise=0.05, spread=0.1, seed=seed),), resamples=1000, seed=0).upper(0.95)
        for seed in range(tries)
    ]
    assert np.mean([bound is not None and bound < 0.05 for bound in bounds]) <= 0.05 + 3 * math.sqrt(
        0.05 * 0.95 / tries
    )


def test_groups_that_flip_as_one_are_not_mistaken_for_many_items() -> None:
    random = np.random.default_rng(4)
    passed = 0
    for _ in range(300):
        groups = np.repeat(np.arange(60), 5)
        draw = random.random(60)[groups]
        base = np.ones(300)
        adapted = np.where(draw < 0.1, 0.0, 1.0)
        pair = Paired("g", "choice", tuple(map(str, groups)), tuple(base), tuple(adapted), (1.0,) * 300, 0.25)
        bound = Drop((pair,), resamples=1000, seed=0).upper(0.95)
        passed += bound is not None and bound < 0.1
    assert passed / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
