"""What `calibrate_repair.py` found, as a section of the calibration's page."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def repairs(found: Mapping[str, Any]) -> str:
    """Return the section; one that could not be repaired won nothing back and gave nothing up."""
    if not found:
        return ""
    rows, beside = [], []
    for name, one in found.items():
        how = f"{one['method']} {one['scale']:.3f}" if one["outcome"] == "repaired" else one["outcome"]
        shares = f"{one.get('won_back', 0.0):.1%} | {one.get('given_up', 0.0):.1%}"
        rows.append(f"| {name} | {how} | {shares} | {one['seconds'] / 60:.0f} |")
        beside += [(name, other) for other in one["beside_uniform"]]
    won, given = (statistics.median(one.get(key, 0.0) for one in found.values()) for key in ("won_back", "given_up"))
    said = (
        f"Medians of {len(found)} narrow, forgetful adapters: {won:.1%} of the damage won back (goal ≥ 80 %), "
        f"{given:.1%} of the task's gain given up (goal ≤ 2 %). Damage is in bits per byte of texts and right answers, "
        "on the items of the search; the task is counted on rows that the search has not seen."
    )
    head = "| adapter | repaired by | damage won back | task gain given up | minutes |\n|---|---|---|---|---|"
    return "\n".join((f"### Repair\n\n{said}\n\n{head}", *rows, "", _beside(beside)))


def _beside(candidates: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Tell how other repairs did beside the uniform scale that does the task as well."""
    if not candidates:
        return "Nothing but uniform scaling was worth measuring.\n"
    rows = []
    for name, one in candidates:
        least = "-" if one["upper"] is None else f"{-one['upper']:+.4f}"
        same = "yes" if one["matched"] else "no"
        rows.append(f"| {name} | {one['method']} | {-one['difference']:+.4f} | {least} | {same} |")
    better = sum(one["better"] for _, one in candidates)
    said = f"{better} of {len(candidates)} other repairs surely keep more than the uniform scale at its task score."
    head = "| adapter | repair | keeps more, bits per byte | at least | task as good |\n|---|---|---|---|---|"
    return "\n".join((said, "", head, *rows, ""))
