"""The routes as an OpenAPI 3.1 description: what clients and their generators read. A test holds it to the routes."""

from typing import Any

from pitstop import __version__
from pitstop.device.protocol.sampling import BIASES, CHOICES, LIKELIEST, STOPS

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_WHOLE: Schema = {"type": "integer"}
_OBJECT: Schema = {"type": "object"}
_TOKENS: Schema = {"type": "array", "items": _WHOLE, "minItems": 1}


def description() -> Schema:
    """Return the description of every route."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pitstop",
            "version": __version__,
            "description": "A base model with adapters: each is a model name, and a request is answered by the one it "
            "names. Errors have OpenAI's shape; 429 and a passing 503 say in Retry-After when to come back.",
        },
        "paths": _paths(),
        "components": {"schemas": _schemas(), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _paths() -> Schema:
    return {
        "/health": {"get": _operation("starting, ready, degraded (with reasons) or stopping", _answer("Health"))},
        "/metrics": {"get": _operation("Counts in Prometheus' text form", _plain())},
        "/openapi.json": {"get": _operation("This description", _json(_OBJECT))},
        "/v1/models": {"get": _operation("The models a request may name", _answer("Models"))},
        "/v1/models/{name}": {
            "get": {
                **_operation("One of them", _answer("Model")),
                "parameters": [{"name": "name", "in": "path", "required": True, "schema": _TEXT}],
            }
        },
        "/v1/chat/completions": {
            "post": _operation("Answer messages, by the model's chat template", _streamed("ChatCompletion"), "Chat")
        },
        "/v1/completions": {
            "post": _operation("Go on with a text, to which nothing is added", _streamed("TextCompletion"), "Text")
        },
        "/v1/load_lora_adapter": {
            "post": _operation("Bring an adapter into memory; all or nothing", _plain(), "LoadAdapter")
        },
        "/v1/unload_lora_adapter": {
            "post": _operation("Let an adapter leave memory, after its answers", _plain(), "UnloadAdapter")
        },
        "/lora-adapters": {
            "get": _operation("The adapters by number", _json({"type": "array", "items": _ref("Adapter")})),
            "post": _operation(
                "Set the adapters of requests to the plain base that name none", _json(_OBJECT), "Scales"
            ),
        },
    }


def _operation(summary: str, answer: Schema, body: str | None = None) -> Schema:
    operation: Schema = {"summary": summary, "responses": {"200": answer, "default": _answer("Error")}}
    if body is not None:
        operation["requestBody"] = {"required": True, **_content(_ref(body))}
    return operation


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(schema: Schema) -> Schema:
    return {"content": {"application/json": {"schema": schema}}}


def _json(schema: Schema) -> Schema:
    return {"description": "as described", **_content(schema)}


def _answer(name: str) -> Schema:
    return _json(_ref(name))


def _plain() -> Schema:
    return {"description": "text", "content": {"text/plain": {"schema": _TEXT}}}


def _streamed(name: str) -> Schema:
    answer = _answer(name)
    answer["description"] = 'with "stream": chunks as server-sent events, the last one [DONE]'
    answer["content"]["text/event-stream"] = {"schema": _TEXT}
    return answer


def _object(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _range(kind: str, low: float, high: float | None = None, default: float | None = None) -> Schema:
    limits = {"minimum": low, "maximum": high, "default": default}
    return {"type": kind, **{name: value for name, value in limits.items() if value is not None}}


def _schemas() -> Schema:
    messages = {"type": "array", "items": _ref("Message"), "minItems": 1}
    prompts = {"oneOf": [_TEXT, _TOKENS, {"type": "array", "items": {"oneOf": [_TEXT, _TOKENS]}, "minItems": 1}]}
    chat = {
        "messages": messages,
        "max_tokens": _range("integer", 1),
        "max_completion_tokens": _range("integer", 1),
        "logprobs": {"type": "boolean", "default": False},
        "top_logprobs": _range("integer", 0, LIKELIEST, 0),
    }
    text = {
        "prompt": prompts,
        "max_tokens": _range("integer", 0, None, 16),
        "logprobs": _range("integer", 0, LIKELIEST),
        "echo": {"type": "boolean", "default": False, "description": "the answer begins with the prompt"},
    }
    return {
        "Chat": _object(chat | _completion(), "model", "messages"),
        "Text": _object(text | _completion(), "model", "prompt"),
        "Message": _object(
            {"role": {"enum": ["system", "developer", "user", "assistant"]}, "content": {}}, "role", "content"
        ),
        **_answers(),
        **_adapters(),
    }


def _completion() -> Schema:
    """Return what both kinds of completion take."""
    stop = {"oneOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": STOPS}]}
    bias = {"type": "object", "additionalProperties": _range("number", -100, 100), "maxProperties": BIASES}
    form = _object({"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": _OBJECT}, "type")
    return {
        "model": _TEXT,
        "n": _range("integer", 1, CHOICES, 1),
        "stream": {"type": "boolean", "default": False},
        "stream_options": {"type": "object", "properties": {"include_usage": _FLAG}},
        "stop": stop,
        "seed": {"type": "integer", "description": "answer i of n has seed + i"},
        "temperature": _range("number", 0, 2, 0),
        "top_p": _range("number", 0, 1, 1),
        "top_k": _range("integer", 0, None, 0),
        "min_p": _range("number", 0, 1, 0),
        "repeat_penalty": _range("number", 0.01, 100, 1),
        "repeat_last_n": _range("integer", 0, 1 << 15, 256),
        "presence_penalty": _range("number", -2, 2, 0),
        "frequency_penalty": _range("number", -2, 2, 0),
        "logit_bias": bias,
        "grammar": {"type": "string", "description": "GBNF with a rule root"},
        "json_schema": _OBJECT,
        "response_format": form,
        "lora": {**_ref("Scales"), "description": "adapters beside the model's own, or its own in another scale"},
    }


def _answers() -> Schema:
    completion = {"id": _TEXT, "object": _TEXT, "created": _WHOLE, "model": _TEXT, "usage": _ref("Usage")}
    completion["choices"] = {"type": "array", "items": _OBJECT}
    counts = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _WHOLE)
    error = {
        "message": _TEXT,
        "type": _TEXT,
        "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    }
    health = {
        "status": {"enum": ["starting", "ready", "degraded", "stopping"]},
        "models": {"type": "object", "additionalProperties": _TEXT},
        "loaded": {"type": "array", "items": _TEXT},
        "reasons": {"type": "object", "additionalProperties": _TEXT},
    }
    model = {"id": _TEXT, "object": _TEXT, "created": _WHOLE, "owned_by": _TEXT, "pitstop": _OBJECT}
    return {
        "ChatCompletion": _object(completion, *completion),
        "TextCompletion": _object(completion, *completion),
        "Usage": _object({**counts, "prompt_tokens_details": _OBJECT, "pitstop": _OBJECT}, *counts),
        "Error": _object({"error": _object(error, *error)}, "error"),
        "Health": _object(health, "status"),
        "Model": _object(model, *model),
        "Models": _object({"object": _TEXT, "data": {"type": "array", "items": _ref("Model")}}, "object", "data"),
    }


def _adapters() -> Schema:
    scale = _object({"id": _range("integer", 0), "scale": _range("number", -100, 100)}, "id", "scale")
    path = {"type": "string", "description": "a GGUF file of the server's machine; left out: a served adapter"}
    pin = {"type": "boolean", "description": "never let it leave memory to make room, or let it again"}
    entry = {"id": _WHOLE, "path": _TEXT, "scale": {"type": "number"}, "pitstop": _OBJECT}
    return {
        "Scales": {"type": "array", "items": scale},
        "Adapter": _object(entry, *entry),
        "LoadAdapter": _object({"lora_name": _TEXT, "lora_path": path, "pin": pin}, "lora_name"),
        "UnloadAdapter": _object({"lora_name": _TEXT}, "lora_name"),
    }
