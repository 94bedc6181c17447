"""Asks through openai, in any of its major versions."""

import asyncio

import openai
from asking import MOST_TOKENS, QUESTION, SEED, TEXT, URL, call, say

client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
chat = {"model": "reasoning", "seed": SEED, "max_tokens": MOST_TOKENS}
asked = {"role": "user", "content": QUESTION}
text = {"model": "base", "seed": SEED, "max_tokens": MOST_TOKENS}


@call
def version():
    return openai.VERSION


@call
def models():
    return [model.id for model in client.models.list()]


@call
def chat_whole():
    return client.chat.completions.create(messages=[asked], **chat).choices[0].message.content


@call
def chat_stream():
    chunks = client.chat.completions.create(
        messages=[asked], **chat, stream=True, stream_options={"include_usage": True}
    )
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


@call
def chat_second():
    first = client.chat.completions.create(messages=[asked], **chat).choices[0].message
    messages = [asked, first.model_dump(), asked]
    return client.chat.completions.create(messages=messages, **chat).choices[0].message.content


@call
def chat_async():
    async def ask():
        async with openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=0) as other:
            return await other.chat.completions.create(messages=[asked], **chat)

    return asyncio.run(ask()).choices[0].message.content


@call
def completion_whole():
    return client.completions.create(prompt=TEXT, **text).choices[0].text


@call
def completion_stream():
    chunks = client.completions.create(prompt=TEXT, **text, stream=True)
    return "".join(chunk.choices[0].text for chunk in chunks)


@call
def scores():
    choice = client.completions.create(
        model="base", prompt=TEXT, max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    return sum(choice.logprobs.token_logprobs[1:])


@call
def refusal():
    try:
        client.completions.create(prompt=TEXT, **text, suffix="end")
    except openai.BadRequestError as error:
        return [error.param, error.code]


say()
