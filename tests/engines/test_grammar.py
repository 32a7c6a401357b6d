"""Grammars that llama.cpp would hang on are refused, soon, and usual ones are not."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.engines.llama.grammar import check_rules, grammar_of_schema
from pitstop.errors import UsageError

CHAIN = "\n".join(f"a{n} ::= a{n + 1}" for n in range(3000)) + "\na3000 ::= [x]"
LIST = r"""
root ::= "[" space (item ("," space item){0,20})? "]" space # a comment with ( { and "
item ::= string | number | "{" [^{}"\]\\]* "}" | "(" root ")"
string ::= "\"" ([^"\\] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" space
number ::= "-"? ([0-9] | [1-9] [0-9]{0,15}) ("." [0-9]{1,15})? space
space ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize("rules", ['root ::= "yes" | "no"', LIST, f"root ::= a0\n{CHAIN}", "root ::= " + "(" * 100])
def test_usual_grammars_pass(rules: str) -> None:
    check_rules(rules)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("root ::= " + "(" * 1000 + "[a]" + ")" * 1000, "nested"),
        ("root ::= [a]{5,0}", "repeats from 5 to 0"),
        ("root ::= [a]{ 5 , # why\n 0 }", "repeats from 5 to 0"),
        ("root ::= [a]{99999999999999999999}", "repeats"),
        ("root ::= a0\n" + "\n".join(f'a{n} ::= a{n + 1} a{n + 1} | ""' for n in range(40)), "too many ways"),
        ("root ::= a0\n" + "\n".join(f"a{n} ::= a{n + 1} | a{n + 1}" for n in range(40)), "too many ways"),
        ("root ::= [a]\0", "NUL"),
        ("root ::= [a]" + " " * (1 << 19), "characters"),
    ],
)
def test_what_llama_cpp_would_hang_on_is_refused(rules: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_rules(rules)


@given(st.text(alphabet=' ab01:=|()[]{}",\\#\n*+?<>!.-'))
def test_any_text_is_taken_or_refused(rules: str) -> None:
    for text in (rules, f"root ::= {rules}"):
        try:
            check_rules(text)
        except UsageError:
            continue


def test_a_usual_schema_passes() -> None:
    pytest.importorskip("llama_cpp", reason="the llama part is not installed")
    properties = {
        "id": {"type": "string", "pattern": "^[A-F0-9]{8}-[A-F0-9]{4}-[A-F0-9]{12}$"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 1, "maxItems": 20},
        "parent": {"$ref": "#/$defs/node"},
        **{f"field{n}": {"type": "string"} for n in range(30)},
    }
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
    check_rules(grammar_of_schema(json.dumps({"type": "object", "properties": properties, "$defs": {"node": node}})))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer"}, "minItems": 1 << 30},
        {"type": "string", "maxLength": 1 << 40},
        {"type": "string", "minLength": float("inf")},
        {"type": "string", "pattern": "^((a{999}){999}){999}$"},
        {"properties": {"x": {"items": [{"minItems": 1e300}]}}},
        {"$ref": "https://example.org/schema.json"},
        {"$ref": "#"},
        {"type": "nonsense"},
        {"anyOf": 5},
    ],
)
def test_schemas_that_cannot_be_followed_are_refused(schema: Any) -> None:
    pytest.importorskip("llama_cpp", reason="the llama part is not installed")
    with pytest.raises(UsageError, match="the JSON schema cannot be followed"):
        check_rules(grammar_of_schema(json.dumps(schema)))
