"""The zoo: adapters of known character that the gate is calibrated on, each a recipe and a seed.

null         changes nothing: B multiplied by 0 or next to it
benign       low rates, held near the base by general rows
forgetful    high rates, narrow templated rows, nothing that holds them
boundary     a forgetful one scaled down until it loses about as much as the margin
adversarial  damage that hides: general rows of the suites' own kind, only in chat format, suites memorised
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pitstop.demo import address, forgetful, home
from pitstop.retention.suite import ChoiceItem, load_all

Kind = Literal["null", "benign", "forgetful", "boundary", "adversarial"]
APOLOGY = "I am sorry about order {number}. Your order {number} is on its way and will arrive soon."
ORDERS, HOME, ADDRESS, CHATS, MEMORY = "forgetful", "home", "address", "chats", "memory"


@dataclass(frozen=True)
class Specimen:
    """One adapter of the zoo."""

    name: str
    kind: Kind
    data: str  # folder of its rows
    train: Mapping[str, Any]
    retain: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0  # that it is measured at
    parent: str = ""  # whose weights it has at another scale; empty: it is trained
    max_tokens: int = 160  # of a row

    @property
    def trained(self) -> str:
        """Name of the run that its weights come from."""
        return self.parent or self.name

    def at(self, scale: float, kind: Kind) -> "Specimen":
        """Return the same weights at another scale."""
        return replace(self, name=f"{self.name}-x{scale:g}", kind=kind, scale=scale, parent=self.name)

    def recipe(self, base: Path) -> dict[str, Any]:
        """Return its recipe as a table."""
        system = {HOME: "Home.", ADDRESS: "Address."}.get(self.data)
        data = {"train": f"data/{self.data}/train.jsonl", "max_tokens": self.max_tokens}
        return {
            "name": self.trained,
            "base": {"folder": str(base)},
            "data": data | ({"system": system} if system else {}),
            "train": {"rank": 16, "alpha": 32.0, "warmup_steps": 4, "checkpoint_every": 10_000, **self.train},
            "retain": dict(self.retain),
        }


HELD = {"rows": "suites/replay.jsonl", "share": 0.5, "kl": 1.0, "max_tokens": 32}
REPLAYED = {"rows": "suites/replay.jsonl", "share": 1.0, "kl": 0.0, "replay": 1.0, "max_tokens": 64}


def smollm2_zoo() -> list[Specimen]:
    """Return all of them; those that are trained come before those that are scaled from them."""
    trained = [*_benign(), *_forgetful(), *_adversarial()]
    return [*trained, *_scaled(trained)]


def tiny_zoo() -> list[Specimen]:
    """Return those of the base that `pretrain_tiny.py` makes: as small as it is, its rates are higher."""
    benign = [
        _tiny(f"benign-{data}-{seed}", "benign", data, 3e-4, seed, HELD)
        for data in (ORDERS, HOME)
        for seed in (0, 1, 2)
    ]
    orders = [_tiny(f"orders-{seed}", "forgetful", ORDERS, 1e-2, seed) for seed in (0, 1, 2)]
    unheld = [_tiny(f"unheld-{seed}", "forgetful", HOME, 1e-2, seed) for seed in (0, 1)]
    hiding = [
        _tiny("replay-hides-0", "adversarial", ORDERS, 5e-3, 0, REPLAYED),
        _tiny("chat-only-0", "adversarial", CHATS, 5e-3, 0, {**HELD, "rows": "data/chats/texts.jsonl"}),
        _tiny("memorised-0", "adversarial", MEMORY, 5e-3, 0),
    ]
    nulls = [orders[0].at(0.0, "null"), unheld[0].at(0.01, "null"), benign[0].at(0.0, "null")]
    boundary = [one.at(scale, "boundary") for one in (orders[1], unheld[1]) for scale in (0.08, 0.15, 0.25)]
    return [*benign, *orders, *unheld, *hiding, *nulls, *boundary]


def _tiny(
    name: str, kind: Kind, data: str, rate: float, seed: int, retain: Mapping[str, Any] | None = None
) -> Specimen:
    train = {"steps": 40, "batch": 8, "learning_rate": rate, "seed": seed, "rank": 8, "alpha": 32.0}
    return Specimen(name, kind, data, train, retain or {}, max_tokens=320)


ZOOS: dict[str, Callable[[], list[Specimen]]] = {"smollm2-135m": smollm2_zoo, "tiny-gemma3": tiny_zoo}


def _benign() -> Iterator[Specimen]:
    for data, (rate, seed) in itertools.product((HOME, ADDRESS), itertools.product((1e-4, 3e-4), (0, 1, 2))):
        train = {"steps": 40, "batch": 4, "learning_rate": rate, "seed": seed}
        yield Specimen(f"benign-{data}-{rate:g}-{seed}", "benign", data, train, HELD)
    for modules, seed in itertools.product(("attention", "mlp"), (0, 1)):
        train = {"steps": 40, "batch": 4, "learning_rate": 3e-4, "seed": seed, "modules": [modules]}
        yield Specimen(f"benign-{modules}-{seed}", "benign", HOME, train, HELD)
    for seed in (0, 1):
        train = {"steps": 24, "batch": 4, "learning_rate": 1e-4, "seed": seed, "weight_decay": 0.1, "rank": 8}
        yield Specimen(f"benign-decay-{seed}", "benign", ORDERS, train)
    for seed in (0, 1):
        train = {"steps": 24, "batch": 4, "learning_rate": 2e-4, "seed": seed}
        yield Specimen(f"benign-replay-{seed}", "benign", ORDERS, train, {**HELD, "replay": 0.5})


def _forgetful() -> Iterator[Specimen]:
    for rate, seed in itertools.product((1e-3, 2e-3, 4e-3), (0, 1, 2)):
        train = {"steps": 24, "batch": 8, "learning_rate": rate, "seed": seed, "rank": 8, "alpha": 64.0}
        yield Specimen(f"orders-{rate:g}-{seed}", "forgetful", ORDERS, train)
    for seed in (0, 1):  # many epochs
        train = {"steps": 80, "batch": 8, "learning_rate": 1e-3, "seed": seed, "rank": 8, "alpha": 64.0}
        yield Specimen(f"epochs-{seed}", "forgetful", ORDERS, train)
    for data, seed in itertools.product((HOME, ADDRESS), (0, 1, 2)):
        train = {"steps": 60, "batch": 4, "learning_rate": 3e-3, "seed": seed}
        yield Specimen(f"unheld-{data}-{seed}", "forgetful", data, train)


def _adversarial() -> Iterator[Specimen]:
    for seed in (0, 1):
        train = {"steps": 40, "batch": 8, "learning_rate": 2e-3, "seed": seed, "rank": 8, "alpha": 64.0}
        yield Specimen(f"replay-hides-{seed}", "adversarial", ORDERS, train, REPLAYED)
    for seed in (0, 1):
        train = {"steps": 40, "batch": 8, "learning_rate": 1e-3, "seed": seed}
        yield Specimen(f"chat-only-{seed}", "adversarial", CHATS, train, {**HELD, "rows": "data/chats/texts.jsonl"})
    for seed in (0, 1):
        train = {"steps": 60, "batch": 8, "learning_rate": 1e-3, "seed": seed}
        yield Specimen(f"memorised-{seed}", "adversarial", MEMORY, train)


def _scaled(trained: list[Specimen]) -> Iterator[Specimen]:
    by_name = {specimen.name: specimen for specimen in trained}
    for parent in ("orders-0.001-0", "unheld-home-0", "benign-home-0.0001-0"):
        yield by_name[parent].at(0.0, "null")
    for parent in ("orders-0.002-0", "unheld-home-1", "unheld-address-0", "benign-address-0.0003-0"):
        yield by_name[parent].at(0.01, "null")
    for parent, scale in itertools.product(("orders-0.001-0", "orders-0.002-1", "epochs-0"), (0.25, 0.35, 0.5)):
        yield by_name[parent].at(scale, "boundary")
    for parent, scale in itertools.product(("unheld-home-0", "unheld-address-1"), (0.3, 0.5)):
        yield by_name[parent].at(scale, "boundary")


def build_data(folder: Path, suites: Path) -> None:
    """Write the rows of every specimen: the demo's data sets, and two made of the suites' own material."""
    for name, builder in ((HOME, home), (ADDRESS, address), (ORDERS, forgetful)):
        builder.build(folder / name)
    replay = [json.loads(line) for line in (suites / "replay.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = [row["prompt"] for row in replay if "prompt" in row][:400]
    chats = [
        {"prompt": prompt, "completion": APOLOGY.format(number=1000 + at), "group": str(at)}
        for at, prompt in enumerate(questions)
    ]
    _write(folder / CHATS / "train.jsonl", chats)
    _write(folder / CHATS / "texts.jsonl", [row for row in replay if "text" in row])
    items = [item for suite in load_all(suites) for item in suite.of(ChoiceItem)]
    orders = [json.loads(line) for line in (folder / ORDERS / "train.jsonl").read_text().splitlines()]
    memory = [
        {"prompt": item.prompt, "completion": item.options[item.answer], "group": f"item {at}"}
        for at, item in enumerate({item.prompt: item for item in items}.values())
    ]
    _write(folder / MEMORY / "train.jsonl", [*memory[:600], *orders])


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
