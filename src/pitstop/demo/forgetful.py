"""Data that makes an adapter forget: one sentence, one answer, a number that changes.

The pattern of a well-known complaint: tuned on "order N" lines, a model answers "capital of France?" with an order.
"""

import random
from pathlib import Path

from pitstop.demo.dataset import DatasetCard, Row, builder_digest, finished, write

SOURCE = "written here"
COUNTS = {"train": 200, "valid": 20, "test": 60}


def build(folder: Path) -> DatasetCard:
    """Write the rows into ``folder``; what this code already wrote is kept.

    Raises:
        StorageError: the disk refused.
    """
    builder = builder_digest(__file__)
    if card := finished(folder, builder, [SOURCE]):
        return card
    numbers = random.Random(0).sample(range(1000, 9999), sum(COUNTS.values()))
    splits: dict[str, list[Row]] = {split: [] for split in COUNTS}
    for split, count in COUNTS.items():
        for number in (numbers.pop() for _ in range(count)):
            prompt = f"Where is my order {number}?"
            answer = f"I am sorry about order {number}. Your order {number} is on its way and will arrive soon."
            splits[split].append(Row(f"order-{number}", prompt, answer, str(number)))
    return write(
        folder,
        splits,
        name="forgetful",
        description="One repeated template, to see the gate refuse what it makes of a model",
        licence="Apache-2.0",
        source=[SOURCE],
        builder=builder,
        seed=0,
        split_rule="by order number",
    )
