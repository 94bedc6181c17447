"""OpenAI's wire format: the fields of requests and the objects in responses.

Unknown fields are refused. Source: OpenAI's API reference for chat completions and (legacy)
completions; `reasoning_content` is DeepSeek's. Not here: routes and connections (app).
"""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from xushi.base.messages import Message
from xushi.base.seeds import derive
from xushi.engine import SamplingParams

LARGEST_BODY = 1 << 20  # bytes
MOST_CHOICES = 64
MOST_MESSAGES = 1024
DEFAULT_COMPLETION_TOKENS = 16


class ApiError(Exception):
    """An error of the API: its HTTP status and its error object."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        kind = {429: "rate_limit_error", 404: "not_found_error"}.get(
            status, "invalid_request_error" if status < 500 else "server_error"
        )
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has half a surrogate pair, which is not a character") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


def _content(value: Any) -> Any:
    """The content of a message: a string, or a list of text parts, which are joined."""
    if not isinstance(value, list):
        return value
    if not all(
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
        for part in value
    ):
        raise ValueError('must be a string or a list of parts {"type": "text", "text": ...}')
    return "".join(part["text"] for part in value)


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


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(_Body):
    """`include_usage` adds a last chunk with token counts."""

    include_usage: bool | None = None


class _Sampling(_Body):
    """The fields of both kinds of request. null means the default."""

    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Annotated[
        Annotated[list[Annotated[Text, Field(min_length=1, max_length=1000)]], Field(max_length=16)]
        | None,
        BeforeValidator(_stops),
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None  # accepted; has no effect

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def params(self, prompts: int, max_tokens: int, drawn_seed: int) -> list[list[SamplingParams]]:
        """For each prompt the parameters of its n choices.

        Choice 0 of the first prompt uses the seed itself (`drawn_seed` if the request has none);
        every other choice uses a seed derived from it.
        """
        seed = drawn_seed if self.seed is None else self.seed
        n = self.n or 1
        return [
            [
                SamplingParams(
                    max_tokens=max_tokens,
                    temperature=1.0 if self.temperature is None else self.temperature,
                    top_p=1.0 if self.top_p is None else self.top_p,
                    seed=derive(seed, "choice", number) if number else seed,
                    stop=tuple(self.stop or ()),
                )
                for number in range(prompt * n, (prompt + 1) * n)
            ]
            for prompt in range(prompts)
        ]


class CompletionBody(_Sampling):
    """POST /v1/completions. `logprobs` may be 0: log-probabilities of the sampled tokens only."""

    prompt: Annotated[
        Annotated[list[Text | list[int]], Field(max_length=MOST_CHOICES)], BeforeValidator(_prompts)
    ]
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = None


class ChatMessage(_Body):
    """One message. The reasoning of earlier answers is accepted but not given to the model."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_content)]
    reasoning_content: Text | None = None

    def as_message(self) -> Message:
        """The message in the form that the tokenizer takes."""
        return Message(self.role, self.content)


class ChatBody(_Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None


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
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is only allowed with stream: true", "stream_options")
    return body


_FIELDS = {
    name
    for kind in (ChatBody, CompletionBody, ChatMessage, StreamOptions)
    for name in kind.model_fields
}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _refusal(error: ValidationError) -> ApiError:
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    is_extra = fault["type"] == "extra_forbidden"
    # pydantic also names the branch of a union, which is not part of the request.
    param = ".".join(
        str(part)
        for part in fault["loc"]
        if isinstance(part, int) or part in _FIELDS or (is_extra and part == fault["loc"][-1])
    )
    if is_extra:
        return ApiError(
            400, f"unknown or unsupported parameter: {param}", param, "unknown_parameter"
        )
    if fault["type"] == "missing":
        return ApiError(400, f"missing parameter: {param}", param, "missing_required_parameter")
    if param in ("top_logprobs", "logprobs"):
        return ApiError(
            400,
            f"{param}: log-probabilities of the sampled tokens are supported, but not those of "
            "alternatives (chat: logprobs=true, completions: logprobs=0)",
            param,
            "unsupported_value",
        )
    return ApiError(
        400, f"{param}: {fault['msg'].removeprefix('Value error, ')}", param, "invalid_value"
    )


def usage(
    prompt_tokens: int, completion_tokens: int, reasoning_tokens: int | None
) -> dict[str, Any]:
    """The `usage` object. Reasoning tokens (chat only) are also counted as completion tokens."""
    table: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if reasoning_tokens is not None:
        table["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return table


def chat_logprobs(
    tokens: list[int], logprobs: list[float], spell: Callable[[int], bytes]
) -> dict[str, Any]:
    """The `logprobs` of a chat choice: of the answer's tokens, natural logarithm, temperature 1.

    `spell` gives the bytes of a token.
    """
    return {
        "content": [
            {
                "token": spell(token).decode("utf-8", "replace"),
                "logprob": logprob,
                "bytes": list(spell(token)),
                "top_logprobs": [],
            }
            for token, logprob in zip(tokens, logprobs, strict=True)
        ],
        "refusal": None,
    }


def completion_logprobs(
    tokens: list[int], logprobs: list[float], spell: Callable[[int], bytes], offset: int
) -> dict[str, Any]:
    """The `logprobs` of a completion choice.

    `offset` is the number of characters before these tokens.
    """
    texts = [spell(token).decode("utf-8", "replace") for token in tokens]
    offsets = [offset + sum(map(len, texts[:index])) for index in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": logprobs,
        "top_logprobs": None,
        "text_offset": offsets,
    }
