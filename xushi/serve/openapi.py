"""The description of the API at /openapi.json, from the classes that check requests.

Not here: the objects of responses (response_schemas). See docs/serve.md.
"""

from typing import Any

from pydantic import BaseModel

import xushi
from xushi.serve.protocol import ChatBody, ChatMessage, CompletionBody, StreamOptions
from xushi.serve.response_schemas import SCHEMAS

# What asks for nothing, in every optional field, known or not. What is nested more deeply is
# accepted, too.
NOTHING: dict[str, list[Any]] = {"enum": [None, "", [], {}]}
BODIES: tuple[type[BaseModel], ...] = (ChatBody, CompletionBody)


def describe_api() -> dict[str, Any]:
    """The API in the form of OpenAPI 3.1."""
    schemas: dict[str, Any] = dict(SCHEMAS)
    for kind in BODIES:
        schemas |= _schemas(kind)
    health = _reading("whether requests are answered", "Health")
    health["responses"]["503"] = _answer("a model is not", {"application/json": _named("Trouble")})
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    chat = _generating("the next message", "ChatBody", "ChatCompletion")
    text = _generating("the rest of a text", "CompletionBody", "Completion")
    return {
        "openapi": "3.1.0",
        "info": {"title": "xushi", "version": xushi.__version__},
        "paths": {
            "/v1/models": {"get": _reading("the models of this server", "Models")},
            "/v1/models/{name}": {"get": _reading("one model", "Model"), "parameters": [name]},
            "/v1/chat/completions": {"post": chat},
            "/v1/completions": {"post": text},
            "/health": {"get": health},
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _schemas(kind: type[BaseModel]) -> dict[str, Any]:
    """The schemas of a body and of the classes in it, with the values that change nothing."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    found = {**schema.pop("$defs", {}), kind.__name__: schema}
    for each in (kind, ChatMessage, StreamOptions):
        if each.__name__ in found:
            _add_what_asks_for_nothing(each, found[each.__name__])
    if "ChatMessage" in found:
        _leave_out_the_content_of_answers(found["ChatMessage"])
        found["TextPart"]["additionalProperties"] = NOTHING
    return found


def _add_what_asks_for_nothing(kind: type[BaseModel], schema: dict[str, Any]) -> None:
    properties = schema["properties"]
    for name, field in kind.model_fields.items():
        if not field.is_required():
            properties[name] = {"anyOf": [properties[name], NOTHING]}
    for name, values in getattr(kind, "neutral", {}).items():
        properties[name] = {"enum": [*values, *NOTHING["enum"]]}
    schema["additionalProperties"] = NOTHING


def _leave_out_the_content_of_answers(schema: dict[str, Any]) -> None:
    """The content of a message of the assistant may be null or missing."""
    schema["required"] = ["role"]
    content = schema["properties"]["content"]
    with_content = {"required": ["content"], "properties": {"content": content}}
    schema["properties"]["content"] = {"anyOf": [content, {"type": "null"}]}
    schema["anyOf"] = [with_content, {"properties": {"role": {"const": "assistant"}}}]


def _reading(what: str, schema: str) -> dict[str, Any]:
    return {"summary": what, "responses": _responses({"application/json": _named(schema)})}


def _generating(what: str, body: str, schema: str) -> dict[str, Any]:
    content = {"application/json": _named(schema), "text/event-stream": {}}
    return {
        "summary": what,
        "requestBody": {"required": True, "content": {"application/json": _named(body)}},
        "responses": _responses(content),
    }


def _responses(content: dict[str, Any]) -> dict[str, Any]:
    return {
        "200": _answer("the answer", content),
        "default": _answer("an error", {"application/json": _named("Error")}),
    }


def _answer(what: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": what, "content": content}


def _named(schema: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{schema}"}}
