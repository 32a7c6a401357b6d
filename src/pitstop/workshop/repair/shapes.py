"""The shapes a change may be given before it is scaled, one or several of each method."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from pitstop.workshop.repair import edits
from pitstop.workshop.repair.pairs import Pair, Pairs
from pitstop.workshop.repair.parts import Head, Heads, layer_of, layers_of, short
from pitstop.workshop.repair.screen import Probe, Slopes

Method = Literal["scale", "modules", "layers", "heads", "ramp", "rank", "null-space"]
METHODS: tuple[Method, ...] = get_args(Method)
SHARES = (1 / 8, 1 / 4, 1 / 2)  # of all parts, worst first, that are given the base's weights back
GAMMAS = (0.5, 0.0)  # of a depth ramp: what is left of the first layer's change
RANKS = (1 / 2, 1 / 4)  # of the adapter's rank
ENERGIES = (0.5, 0.9)  # of the general activations' second moment that a module is to ignore
LEAST_COST = 1e-6  # nats per token: what costs less counts as this much


@dataclass(frozen=True)
class Step:
    """A change with its parameters, as the adapter's history keeps it."""

    method: str
    parameters: dict[str, float]


@dataclass(frozen=True)
class Shape:
    """An adapter changed by some method, not yet scaled."""

    method: Method
    steps: tuple[Step, ...]
    pairs: Pairs = field(repr=False)

    def scaled(self, factor: float) -> dict[str, Pair]:
        """Return its factors at a scale."""
        return edits.scale(self.pairs, factor)

    def words(self) -> str:
        """Return what was done, in a few words."""
        return "; ".join(_words(step) for step in self.steps)


def plain(pairs: Pairs) -> Shape:
    """The adapter as it is: what uniform scaling scales."""
    return Shape("scale", (), pairs)


def ramps(pairs: Pairs, layers: int) -> list[Shape]:
    """Let early layers change less than late ones."""
    return [Shape("ramp", (Step("ramp", {"gamma": g}),), edits.depth_ramp(pairs, g, layers)) for g in GAMMAS]


def ranks(pairs: Pairs) -> list[Shape]:
    """Keep the largest directions of every module's change."""
    full = max(pair.a.shape[0] for pair in pairs.values())
    kept = sorted({max(1, round(full * share)) for share in RANKS} - {full}, reverse=True)
    return [Shape("rank", (Step("rank", {"rank": float(rank)}),), edits.truncate_rank(pairs, rank)) for rank in kept]


def null_spaces(pairs: Pairs, probe: Probe) -> list[Shape]:
    """Let modules ignore the directions in which general text moves them most."""
    found: dict[float, dict[str, Pair]] = {energy: {} for energy in ENERGIES}
    ignored: dict[float, list[int]] = {energy: [] for energy in ENERGIES}
    for modules, moment in probe.covariances():
        sizes, directions = torch.linalg.eigh(moment)  # smallest first
        total = sizes.clamp(min=0).flip(0).cumsum(0)
        for energy in ENERGIES:
            count = int((total < energy * total[-1]).sum()) + 1
            u = directions[:, -count:].cpu()
            ignored[energy] += [count] * len(modules)
            found[energy].update(edits.project_out({name: pairs[name] for name in modules}, dict.fromkeys(modules, u)))
    return [
        Shape(
            "null-space", (Step("null-space", {"energy": energy, "directions": _mean(ignored[energy])}),), found[energy]
        )
        for energy in ENERGIES
    ]


@dataclass(frozen=True)
class Funnel:
    """The parts of an adapter, the most worth giving up first."""

    method: Method
    parts: tuple[str, ...]  # as a step names them
    revert: Callable[[Sequence[str]], dict[str, Pair]]

    def shapes(self) -> Iterator[Shape]:
        """Yield shapes with more and more parts given up."""
        for count in sorted({max(1, round(len(self.parts) * share)) for share in SHARES}):
            if count < len(self.parts):
                yield self.without(count)

    def without(self, count: int) -> Shape:
        """Return the shape without the first so many parts."""
        gone = self.parts[:count]
        return Shape(self.method, (Step(self.method, dict.fromkeys(gone, 0.0)),), self.revert(gone))


def funnels(pairs: Pairs, slopes: Mapping[str, list[Slopes]], heads: Heads, wanted: Sequence[Method]) -> list[Funnel]:
    """Order modules, layers and heads by what giving them up wins for what it costs, to first order."""
    makers = {"modules": _module_funnel, "layers": _layer_funnel, "heads": _head_funnel}
    made = [makers[method](pairs, slopes, heads) for method in wanted if method in makers]
    return [funnel for funnel in made if funnel.parts]


def _module_funnel(pairs: Pairs, slopes: Mapping[str, list[Slopes]], _: Heads) -> Funnel:
    names = {short(name): name for name in pairs}
    order = _order({label: _sum(slopes[name]) for label, name in names.items()})
    return Funnel("modules", order, lambda gone: edits.scale_modules(pairs, {names[label]: 0.0 for label in gone}))


def _layer_funnel(pairs: Pairs, slopes: Mapping[str, list[Slopes]], _: Heads) -> Funnel:
    members = {
        str(layer): _sum(one for name in pairs if layer_of(name) == layer for one in slopes[name])
        for layer in layers_of(pairs)
    }
    return Funnel("layers", _order(members), lambda gone: edits.scale_layers(pairs, {int(at): 0.0 for at in gone}))


def _head_funnel(pairs: Pairs, slopes: Mapping[str, list[Slopes]], heads: Heads) -> Funnel:
    labels: dict[str, Head] = {}
    members: dict[str, list[Slopes]] = {}
    for name in pairs:
        layer = layer_of(name)
        if heads.side(name) is None or layer is None or len(slopes[name]) != heads.count:
            continue
        for at, one in enumerate(slopes[name]):
            labels[f"{layer}.{at}"] = (layer, at)
            members.setdefault(f"{layer}.{at}", []).append(one)
    order = _order({label: _sum(found) for label, found in members.items()})
    return Funnel("heads", order, lambda gone: edits.scale_heads(pairs, {labels[label]: 0.0 for label in gone}, heads))


def _order(parts: Mapping[str, Slopes]) -> tuple[str, ...]:
    """Return the parts without which the base keeps more, those that cost the task least for it first."""
    won = {name: one.general for name, one in parts.items() if one.general > 0}
    return tuple(sorted(won, key=lambda name: -won[name] / max(-parts[name].task, LEAST_COST)))


def _sum(slopes: Iterable[Slopes]) -> Slopes:
    every = list(slopes)
    return Slopes(sum(one.general for one in every), sum(one.task for one in every))


def _mean(counts: Sequence[int]) -> float:
    return round(sum(counts) / len(counts), 1)


def _words(step: Step) -> str:
    match step.method:
        case "scale":
            return f"scaled by {step.parameters['scale']:.3g}"
        case "ramp":
            return f"first layer at {step.parameters['gamma']:g}, rising to the last"
        case "rank":
            return f"rank {step.parameters['rank']:.0f}"
        case "null-space":
            share, count = step.parameters["energy"], step.parameters["directions"]
            return f"without {share:.0%} of what moves on general text ({count:g} directions a module)"
    parts = list(step.parameters)
    shown = ", ".join(parts[:4]) + (" …" if len(parts) > 4 else "")
    kind = step.method if len(parts) > 1 else step.method.removesuffix("s")
    return f"without {len(parts)} {kind} ({shown})"
