"""Asks through litellm."""

import litellm
from asking import MOST_TOKENS, QUESTION, SEED, TEXT, URL, call, say

litellm.suppress_debug_info = True
where = {"api_base": URL, "api_key": "none", "seed": SEED, "max_tokens": MOST_TOKENS}
chat = {"model": "openai/reasoning", **where}
text = {"model": "text-completion-openai/base", "prompt": TEXT, **where}
asked = {"role": "user", "content": QUESTION}


@call
def chat_whole():
    return litellm.completion(messages=[asked], **chat).choices[0].message.content


@call
def chat_stream():
    chunks = litellm.completion(messages=[asked], **chat, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@call
def chat_second():
    first = litellm.completion(messages=[asked], **chat).choices[0].message
    messages = [asked, first.model_dump(), asked]
    return litellm.completion(messages=messages, **chat).choices[0].message.content


@call
def completion_whole():
    return litellm.text_completion(**text).choices[0].text


@call
def completion_stream():
    chunks = litellm.text_completion(**text, stream=True)
    return "".join(chunk.choices[0].text or "" for chunk in chunks)


say()
