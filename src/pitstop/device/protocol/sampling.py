"""How an answer is to be chosen, in the words of OpenAI's API and of llama-server."""

import json
import secrets
from collections.abc import Mapping
from typing import Any

from pitstop.device.protocol.fields import BadRequest, is_number, is_whole, number, optional, required, whole
from pitstop.engines.base import Sampling

CHOICES = 8  # answers one request may ask for to the same prompt
LIKELIEST = 20  # tokens whose log-probabilities one may ask for
STOPS = 16  # stop texts one request may name
BIASES = 1024  # tokens whose chance one may change
GRAMMAR = 1 << 15  # characters of a grammar
SCHEMA = 1 << 16  # characters of a JSON schema
UNLIMITED = 1 << 30  # tokens; up to the context's end

# What OpenAI's API, llama-server and vLLM have and pitstop has not: values that ask for nothing pass, any other is
# refused, not ignored.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "best_of": (1,),
    "n_probs": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "typical_p": (1,),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "top_n_sigma": (-1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}


def check_supported(data: Mapping[str, Any]) -> None:
    """Refuse what pitstop cannot do.

    Raises:
        BadRequest: a field asks for it.
    """
    for name, neutral in UNSUPPORTED.items():
        if data.get(name) is not None and data[name] not in neutral:
            raise BadRequest(f"{name!r} is not supported here", name)


def parse_sampling(data: Mapping[str, Any], *, max_tokens: int, logprobs: int | None) -> Sampling:
    """Read what chat and text completions have in common.

    Greedy unless asked otherwise: the adapters of a board answer in fixed forms.

    Raises:
        BadRequest: a field has a wrong type or value.
    """
    grammar, schema = _constraint(data)
    return Sampling(
        max_tokens=max_tokens,
        temperature=number(data, "temperature", 0.0, 0.0, 2.0),
        top_p=number(data, "top_p", 1.0, 1e-6, 1.0),
        top_k=whole(data, "top_k", 0, 0, UNLIMITED),
        min_p=number(data, "min_p", 0.0, 0.0, 1.0),
        repeat_penalty=number(data, "repeat_penalty", 1.0, 0.01, 100.0),
        presence_penalty=number(data, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=number(data, "frequency_penalty", 0.0, -2.0, 2.0),
        penalty_tokens=whole(data, "repeat_last_n", Sampling.penalty_tokens, 0, 1 << 15),
        logit_bias=_bias(optional(data, "logit_bias", dict, {})),
        grammar=grammar,
        json_schema=schema,
        logprobs=logprobs,
        seed=whole(data, "seed", secrets.randbits(31), -(1 << 63), (1 << 63) - 1) % (1 << 32),
        stop=_stop(data),
    )


def parse_scales(entries: Any, at: str) -> dict[int, float]:
    """Read a list of adapters by number, as llama-server has it: ``[{"id": 0, "scale": 1.0}]``.

    Raises:
        BadRequest: it is something else, or names an adapter twice.
    """
    if not isinstance(entries, list) or not all(map(_is_scale, entries)):
        raise BadRequest(f"{at!r} must be a list of objects with a whole 'id' and a 'scale' from -100 to 100", at)
    scales = {entry["id"]: float(entry["scale"]) for entry in entries}
    if len(scales) < len(entries):
        raise BadRequest(f"{at!r} names an adapter twice", at)
    return scales


def _is_scale(entry: Any) -> bool:
    if not isinstance(entry, dict) or not is_whole(entry.get("id")):
        return False
    return is_number(entry.get("scale")) and -100 <= entry["scale"] <= 100


def _stop(data: Mapping[str, Any]) -> tuple[str, ...]:
    stop = [data["stop"]] if isinstance(data.get("stop"), str) else optional(data, "stop", list, [])
    if len(stop) > STOPS or not all(isinstance(text, str) and text for text in stop):
        raise BadRequest(f"'stop' must be a text or up to {STOPS} of them, none empty", "stop")
    return tuple(stop)


def _bias(entries: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    for token, bias in entries.items():
        is_token = token.isascii() and token.isdigit() and len(token) < 10
        if not is_token or not is_number(bias) or not -100 <= bias <= 100:
            raise BadRequest("'logit_bias' must map tokens, as numbers, to numbers from -100 to 100", "logit_bias")
    if len(entries) > BIASES:
        raise BadRequest(f"'logit_bias' may name {BIASES:,} tokens at most", "logit_bias")
    return tuple({int(token): float(bias) for token, bias in entries.items()}.items())


def _constraint(data: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the grammar, or the JSON schema as text, that the answer must follow."""
    grammar, schema = optional(data, "grammar", str, None), optional(data, "json_schema", dict, None)
    named = [name for name in ("grammar", "json_schema") if data.get(name) is not None]
    wanted = _response_schema(optional(data, "response_format", dict, {}))
    if wanted is not None:
        named.append("response_format")
        schema = wanted
    if len(named) > 1:
        raise BadRequest(f"{named[0]!r} and {named[1]!r} cannot both be followed", named[0])
    if grammar is not None and len(grammar) > GRAMMAR:
        raise BadRequest(f"'grammar' may have {GRAMMAR:,} characters at most", "grammar")
    return grammar, None if schema is None else _schema_text(schema, named[0])


def _schema_text(schema: Mapping[str, Any], at: str) -> str:
    try:
        text = json.dumps(schema)
    except RecursionError as error:
        raise BadRequest(f"{at!r} is nested too deeply", at) from error
    if len(text) > SCHEMA:
        raise BadRequest(f"{at!r} may have {SCHEMA:,} characters at most", at)
    return text


def _response_schema(wanted: Mapping[str, Any]) -> Any:
    kind = wanted.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return optional(wanted, "schema", dict, {"type": "object"})
    if kind == "json_schema":
        return required(required(wanted, "json_schema", dict), "schema", dict)
    raise BadRequest("'response_format.type' must be text, json_object or json_schema", "response_format")
