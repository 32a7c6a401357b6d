"""Grammars that llama.cpp can follow: what would make it hang, or take all memory, is refused before it reads it.

A grammar comes with a request, from anybody, and is read on the one thread that answers everybody else.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from pitstop.errors import UsageError

LENGTH = 1 << 18  # characters
DEPTH = 512  # parentheses within parentheses, which are read by recursion
REPEATS = 2000  # of one part; llama.cpp has the same limit, but not for all ways to write it
PATHS = 5_000_000  # ways through the rules: llama.cpp walks them all when it looks for left recursion
CURE = "write it in GBNF, with a rule root"

_LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\r\n]*', re.DOTALL)
_RULE = re.compile(r"([A-Za-z0-9-]+)\s*::=")
_REPEAT = re.compile(r"\{([^{}]*)\}")
_SIZES = ("minLength", "maxLength", "minItems", "maxItems")


def grammar_of_schema(schema: str) -> str:
    """Return the GBNF that admits just the JSON of a schema, by llama-cpp-python's port of llama.cpp's converter.

    Raises:
        UsageError: it is no schema, or uses what the converter has not.
    """
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        _check_sizes(json.loads(schema))
        rules: str = json_schema_to_gbnf(schema)
    except Exception as error:  # the converter raises whatever its parts raise
        raise UsageError(f"the JSON schema cannot be followed: {error}", cure="simplify it") from error
    return rules


def _check_sizes(schema: Any) -> None:
    """Refuse repetitions that the converter would write out, each in full."""
    todo = [schema]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += part
        if not isinstance(part, dict):
            continue
        todo += part.values()
        sizes = [part[name] for name in _SIZES if isinstance(part.get(name), int | float)]
        # One repetition may stand in another: their product counts.
        pattern = part["pattern"] if isinstance(part.get("pattern"), str) else ""
        sizes.append(math.prod(_largest(pattern)))
        if not all(size <= REPEATS for size in sizes):
            raise UsageError(f"{max(sizes):,} repetitions are too many")


def check_rules(rules: str) -> None:
    """Refuse a grammar that llama.cpp would not get to the end of.

    Raises:
        UsageError: it is too long, nested too deeply, repeats too often, or branches too much.
    """
    if len(rules) > LENGTH or "\0" in rules:
        raise UsageError(f"the grammar has more than {LENGTH:,} characters, or a NUL", cure=CURE)
    bare = _LITERAL.sub(" ", rules)
    if _depth(bare) > DEPTH:
        raise UsageError(f"the grammar is nested more than {DEPTH} deep", cure=CURE)
    for bounds in _bounds(bare):
        if max(bounds) > REPEATS or bounds[0] > bounds[-1]:
            raise UsageError(f"the grammar repeats from {bounds[0]} to {bounds[-1]} times", cure=CURE)
    if _paths(bare) > PATHS:
        raise UsageError("the rules of the grammar refer to one another in too many ways", cure="simplify it")


def _depth(bare: str) -> int:
    deepest = depth = 0
    for character in bare:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _bounds(text: str) -> Iterator[list[int]]:
    """Yield the numbers of every repetition in braces."""
    for inside in _REPEAT.findall(text):
        if numbers := [int(number[:9]) for number in re.findall(r"[0-9]+", inside)]:
            yield numbers


def _largest(text: str) -> Iterator[int]:
    return (max(1, *bounds) for bounds in _bounds(text))


def _paths(bare: str) -> int:
    """Return an upper bound of the ways from a rule to the ends of all it refers to."""
    _, *parts = _RULE.split(bare)
    bodies: dict[str, list[str]] = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        bodies[name] = re.findall(r"[A-Za-z0-9-]+|\(", _REPEAT.sub(" ", body))
    repeats = {
        name: min(REPEATS, math.prod(_largest(body))) for name, body in zip(parts[::2], parts[1::2], strict=True)
    }
    counts: dict[str, int] = {}
    for start in bodies:
        _count_paths(start, bodies, repeats, counts)
    return max(counts.values(), default=0)


def _count_paths(start: str, bodies: dict[str, list[str]], repeats: dict[str, int], counts: dict[str, int]) -> None:
    # Not by recursion: a chain of rules may be longer than Python's stack.
    begun, todo = set(), [start]
    while todo:
        name = todo[-1]
        missing = [] if name in begun else [one for one in bodies[name] if one in bodies and one not in counts]
        begun.add(name)
        todo += [one for one in dict.fromkeys(missing) if one not in begun]
        if todo[-1] == name:
            todo.pop()
            counts[name] = 1 + repeats[name] * sum(counts.get(one, 1) for one in bodies[name])
