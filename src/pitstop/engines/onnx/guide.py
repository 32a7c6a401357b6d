"""JSON schemas that answers follow: the library's own grammar engine (llguidance) reads them."""

import json

from pitstop.engines.base import Sampling
from pitstop.errors import UsageError

LENGTH = 1 << 18  # characters


def guide_of(sampling: Sampling) -> str | None:
    """Return the schema an answer follows, as the library takes it; None: no schema was asked for.

    White space is as `json.dumps` writes it: free to choose it, a small model goes on writing it for ever.

    Raises:
        UsageError: it is no schema, or a GBNF grammar was asked for.
    """
    if sampling.grammar is not None:
        raise UsageError("the ONNX engine follows JSON schemas, not GBNF grammars", cure="ask for a json_schema")
    if sampling.json_schema is None:
        return None
    if len(sampling.json_schema) > LENGTH:
        raise UsageError(f"the JSON schema is longer than {LENGTH:,} characters", cure="simplify it")
    try:
        schema = json.loads(sampling.json_schema)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the JSON schema cannot be followed: {error}", cure="give JSON") from error
    if not isinstance(schema, dict):
        raise UsageError("the JSON schema cannot be followed: it is no object", cure="give a JSON object")
    spaces = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
    return json.dumps({**schema, "x-guidance": spaces})
