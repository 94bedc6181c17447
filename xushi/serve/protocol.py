"""The fields of requests in OpenAI's wire format.

Every field is declared here, or in `fields` if it is not acted on. Unknown fields that have a value
are refused. Source: OpenAI's API reference for chat completions and (legacy) completions;
`reasoning_content` is DeepSeek's; `ignore_eos` and `continuous_usage_stats` are vLLM's. Not here:
routes and connections (app), the objects of responses (responses, logprobs).
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from xushi.base.messages import Message
from xushi.base.seeds import derive
from xushi.engine import SamplingParams
from xushi.serve import fields

LARGEST_BODY = 1 << 20  # bytes
MOST_CHOICES = 64
MOST_MESSAGES = 1024
MOST_ALTERNATIVES = 20  # as in OpenAI's chat completions
DEFAULT_COMPLETION_TOKENS = 16
# Log-probabilities in one response, alternatives counted: about 60 MB of JSON. Those that a stream
# generates are in chunks of their own and not counted.
MOST_SCORES = 1 << 20


class ApiError(Exception):
    """An error of the API: its HTTP status and its error object."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kind = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Unsupported(ValueError):
    """A value that would change the answer and is not acted on. `name`: its field, if the error is
    raised for the object that holds it.
    """

    def __init__(self, message: str, name: str | None = None) -> None:
        super().__init__(message)
        self.name = name


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has half a surrogate pair, which is not a character") from None
    return text


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 16.0 is the whole number 16."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _content(value: Any) -> Any:
    """The content of a message: a string, or a list of text parts, which are joined."""
    if not isinstance(value, list):
        return value
    parts = [
        {key: item for key, item in part.items() if key == "text" or not fields.is_nothing(item)}
        if isinstance(part, dict)
        else {}
        for part in value
    ]
    if not all(
        part.keys() == {"type", "text"} and part["type"] == "text" and isinstance(part["text"], str)
        for part in parts
    ):
        raise ValueError('must be a string or a list of parts {"type": "text", "text": ...}')
    return "".join(part["text"] for part in parts)


def _prompts(value: Any) -> Any:
    """Convert each of the four forms of a prompt to a list of texts or of lists of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(_is_id(item) for item in value):
            return [value]
        if all(
            isinstance(item, list) and item and all(_is_id(token) for token in item)
            for item in value
        ):
            return value
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of such lists, and "
        "not empty"
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _no_bias(value: Any) -> Any:
    if isinstance(value, dict) and not all(fields.is_one_of(bias, (0,)) for bias in value.values()):
        raise _Unsupported("only biases of 0 are supported")
    return value


Text = Annotated[str, AfterValidator(_encodable)]
WHOLE = BeforeValidator(_whole)  # after the bounds: JSON schemas then have them
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]
# The forms before they are made one, for /openapi.json.
_Ids = Annotated[list[int], Field(min_length=1)]
_Several = Field(min_length=1, max_length=MOST_CHOICES)
_Prompts = str | Annotated[list[str], _Several] | _Ids | Annotated[list[_Ids], _Several]
_Stops = Stop | Annotated[list[Stop], Field(max_length=16)]


class TextPart(BaseModel):
    """A part of a message's content, for /openapi.json; `_content` reads them."""

    type: Literal["text"]
    text: str


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    # Fields that are not acted on, and the values that they may have.
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        kept = {}
        for name, value in table.items():
            field = cls.model_fields.get(name)
            if (field is None or not field.is_required()) and fields.is_nothing(value):
                continue
            if name in cls.neutral and fields.is_one_of(value, cls.neutral[name]):
                continue
            if name in cls.neutral:
                allowed = " or ".join(json.dumps(other) for other in cls.neutral[name])
                raise _Unsupported(f"only {allowed} is supported", name)
            kept[name] = value
        return kept


class StreamOptions(_Body):
    """`include_usage` adds a last chunk with token counts, `continuous_usage_stats` adds the counts
    so far to every chunk.
    """

    neutral = fields.STREAM_OPTIONS

    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Sampling(_Body):
    """The fields of both kinds of request."""

    model: Text
    max_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), WHOLE] = 1
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), WHOLE] | None = None
    stop: Annotated[
        Annotated[list[Stop], Field(max_length=16)],
        BeforeValidator(_stops, json_schema_input_type=_Stops),
    ] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logit_bias: Annotated[
        dict[str, float], BeforeValidator(_no_bias, json_schema_input_type=dict[str, Literal[0]])
    ] = {}
    ignore_eos: bool = False
    # They label a request for its sender and never change an answer.
    user: Text = ""
    metadata: dict[str, Any] = {}
    safety_identifier: Text = ""
    prompt_cache_key: Text = ""

    def params(
        self, prompts: int, max_tokens: int, drawn_seed: int, alternatives: int, echo: bool = False
    ) -> list[list[SamplingParams]]:
        """For each prompt the parameters of its n choices.

        Choice 0 of the first prompt uses the seed itself (`drawn_seed` if the request has none);
        every other choice uses a seed derived from it. With `echo` the prompt's tokens get
        log-probabilities too.
        """
        seed = drawn_seed if self.seed is None else self.seed
        return [
            [
                SamplingParams(
                    max_tokens=max_tokens,
                    temperature=self.temperature,
                    top_p=self.top_p,
                    seed=derive(seed, "choice", number) if number else seed,
                    stop=tuple(self.stop),
                    ignore_eos=self.ignore_eos,
                    top_logprobs=alternatives,
                    prompt_logprobs=echo,
                )
                for number in range(prompt * self.n, (prompt + 1) * self.n)
            ]
            for prompt in range(prompts)
        ]


class CompletionBody(_Sampling):
    """POST /v1/completions. `logprobs` is the number of alternatives at each place; 0 gives the
    log-probabilities of the tokens themselves only. `echo` puts the prompt before the text.
    """

    neutral = fields.COMPLETIONS

    prompt: Annotated[
        Annotated[list[Text | list[int]], Field(max_length=MOST_CHOICES)],
        BeforeValidator(_prompts, json_schema_input_type=_Prompts),
    ]
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES), WHOLE] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1), WHOLE] | None = None


class ChatMessage(_Body):
    """One message. The reasoning of earlier answers is accepted but not given to the model."""

    neutral = fields.MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_content, json_schema_input_type=str | list[TextPart])]
    reasoning_content: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _answer_without_text(cls, table: Any) -> Any:
        """The content of an answer may be null or missing."""
        if isinstance(table, dict) and table.get("role") == "assistant":
            return table if table.get("content") is not None else {**table, "content": ""}
        return table

    def as_message(self, with_reasoning: bool = False) -> Message:
        """The message in the form that the tokenizer takes."""
        role = "system" if self.role == "developer" else self.role
        return Message(role, self.content, self.reasoning_content if with_reasoning else None)


class ChatBody(_Sampling):
    """POST /v1/chat/completions. `top_logprobs` is the number of alternatives at each place."""

    neutral = fields.CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES), WHOLE] = 0


BodyT = TypeVar("BodyT", CompletionBody, ChatBody)


def parse_body(kind: type[BodyT], raw: bytes) -> BodyT:
    """Parse and check a request. An error is an `ApiError` 400 that names the parameter."""
    try:
        table = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(table, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        body = kind.model_validate(table)
    except ValidationError as error:
        raise _refusal(error) from None
    _check_together(body)
    return body


def _check_together(body: CompletionBody | ChatBody) -> None:
    """Refuse fields that contradict each other."""
    options = body.stream_options
    if not body.stream and (options.include_usage or options.continuous_usage_stats):
        raise ApiError(400, "stream_options is only allowed with stream: true", "stream_options")
    if isinstance(body, CompletionBody):
        if body.best_of not in (None, 1, body.n):
            raise ApiError(
                400,
                "best_of: only 1 or the value of n is supported",
                "best_of",
                "unsupported_value",
            )
        return
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError(400, "give max_tokens or max_completion_tokens, not both", "max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(
            400, "top_logprobs is only allowed with logprobs: true", "top_logprobs", "invalid_value"
        )


_FIELDS = {
    name
    for kind in (ChatBody, CompletionBody, ChatMessage, StreamOptions)
    for name in kind.model_fields
}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _refusal(error: ValidationError) -> ApiError:
    fault = error.errors(include_url=False, include_input=False)[0]
    is_extra = fault["type"] == "extra_forbidden"
    # pydantic also names the branch of a union, which is not part of the request.
    parts = [
        str(part)
        for part in fault["loc"]
        if isinstance(part, int) or part in _FIELDS or (is_extra and part == fault["loc"][-1])
    ]
    cause = fault.get("ctx", {}).get("error")
    is_unsupported = isinstance(cause, _Unsupported)
    if isinstance(cause, _Unsupported) and cause.name:
        parts.append(cause.name)
    param = ".".join(parts)
    if is_extra:
        return ApiError(
            400, f"unknown or unsupported parameter: {param}", param, "unknown_parameter"
        )
    if fault["type"] == "missing":
        return ApiError(400, f"missing parameter: {param}", param, "missing_required_parameter")
    code = "unsupported_value" if is_unsupported else "invalid_value"
    return ApiError(400, f"{param}: {fault['msg'].removeprefix('Value error, ')}", param, code)
