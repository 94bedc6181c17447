"""The description of the API at /openapi.json, from the classes that check requests.

Not here: the form of responses beyond their media type; see docs/serve.md.
"""

from typing import Any

from pydantic import BaseModel

import xushi
from xushi.serve.protocol import ChatBody, CompletionBody

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def describe_api() -> dict[str, Any]:
    """The API in the form of OpenAPI 3.1."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    for kind in (ChatBody, CompletionBody):
        schemas |= _schemas(kind)
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "xushi", "version": xushi.__version__},
        "paths": {
            "/v1/models": {"get": _reading("the models of this server")},
            "/v1/models/{name}": {"get": _reading("one model"), "parameters": [name]},
            "/v1/chat/completions": {"post": _generating("the next message", ChatBody)},
            "/v1/completions": {"post": _generating("the rest of a text", CompletionBody)},
            "/health": {"get": _reading("whether requests are answered")},
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _schemas(kind: type[BaseModel]) -> dict[str, Any]:
    """The schemas of a body and of the classes in it. Values that ask for nothing are added."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    inner = schema.pop("$defs", {})
    properties = schema["properties"]
    for name, values in getattr(kind, "neutral", {}).items():
        properties[name] = {"enum": [*values, None]}
    return {**inner, kind.__name__: schema}


def _reading(what: str) -> dict[str, Any]:
    return {"summary": what, "responses": _responses({"application/json": {}})}


def _generating(what: str, kind: type[BaseModel]) -> dict[str, Any]:
    body = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {
        "summary": what,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": _responses({"application/json": {}, "text/event-stream": {}}),
    }


def _responses(content: dict[str, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "200": {"description": "the answer", "content": content},
        "default": {"description": "an error", "content": error},
    }
