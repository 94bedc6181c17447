"""JSON schemas of the objects that the API answers with, for /openapi.json.

Every key of an object is named and required. Not here: requests (openapi), the objects themselves
(responses, logprobs).
"""

from typing import Any


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(properties),
        "properties": properties,
        "additionalProperties": False,
    }


def _array(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _or_null(schema: Any) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _of(kind: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{kind}"}


TEXT = {"type": "string"}
WHOLE = {"type": "integer", "minimum": 0}
NUMBER = {"type": "number"}
FLAG = {"type": "boolean"}

_CARD = {"title": TEXT, "can": TEXT, "cannot": TEXT}
_MODEL = _object(
    id=TEXT,
    object={"const": "model"},
    created=WHOLE,
    owned_by={"const": "xushi"},
    xushi=_object(chat=FLAG, context=WHOLE, **_CARD, example=TEXT, chinese=_object(**_CARD)),
)
_USAGE = {"prompt_tokens": WHOLE, "completion_tokens": WHOLE, "total_tokens": WHOLE}
_ENTRY = {"token": TEXT, "logprob": NUMBER, "bytes": _array({"type": "integer", "maximum": 255})}
_FINISH = {"enum": ["stop", "length"]}
_CHAT_CHOICE = _object(
    index=WHOLE,
    message=_object(role={"const": "assistant"}, content=TEXT, reasoning_content=_or_null(TEXT)),
    logprobs=_or_null(
        _object(
            content=_array(_object(**_ENTRY, top_logprobs=_array(_object(**_ENTRY)))),
            refusal={"type": "null"},
        )
    ),
    finish_reason=_FINISH,
)
_TEXT_CHOICE = _object(
    index=WHOLE,
    text=TEXT,
    logprobs=_or_null(
        _object(
            tokens=_array(TEXT),
            token_logprobs=_array(_or_null(NUMBER)),
            top_logprobs=_or_null(
                _array(_or_null({"type": "object", "additionalProperties": NUMBER}))
            ),
            text_offset=_array(WHOLE),
        )
    ),
    finish_reason=_FINISH,
)


def _completion(kind: str, choice: Any, usage: Any) -> dict[str, Any]:
    return _object(
        id=TEXT,
        object={"const": kind},
        created=WHOLE,
        model=TEXT,
        choices={**_array(choice), "minItems": 1},
        usage=usage,
    )


SCHEMAS: dict[str, Any] = {
    "Error": _object(
        error=_object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=_or_null(TEXT))
    ),
    "Health": _object(status={"const": "ok"}),
    "Trouble": _object(
        status={"const": "failed"}, models={"type": "object", "additionalProperties": TEXT}
    ),
    "Model": _MODEL,
    "Models": _object(object={"const": "list"}, data=_array(_of("Model"))),
    "ChatCompletion": _completion(
        "chat.completion",
        _CHAT_CHOICE,
        _object(**_USAGE, completion_tokens_details=_object(reasoning_tokens=WHOLE)),
    ),
    "Completion": _completion("text_completion", _TEXT_CHOICE, _object(**_USAGE)),
}
"""By their names in the description."""
