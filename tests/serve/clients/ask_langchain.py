"""Asks through langchain-openai."""

from asking import MOST_TOKENS, QUESTION, SEED, TEXT, URL, call, say
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

where = {"base_url": URL, "api_key": "none", "max_retries": 0}
same = {"seed": SEED, "max_tokens": MOST_TOKENS, "temperature": 1}
chat = ChatOpenAI(model="reasoning", **where, **same)
text = OpenAI(model="base", **where, **same)


@call
def chat_whole():
    return chat.invoke(QUESTION).content


@call
def chat_stream():
    return "".join(chunk.content for chunk in chat.stream(QUESTION))


@call
def chat_second():
    asked = HumanMessage(QUESTION)
    return chat.invoke([asked, chat.invoke([asked]), asked]).content


@call
def completion_whole():
    return text.invoke(TEXT)


@call
def completion_stream():
    return "".join(text.stream(TEXT))


@call
def completion_default():
    """Without a seed any text may come, an empty one too; that one comes is what counts."""
    return isinstance(OpenAI(model="base", **where).invoke(TEXT), str)


say()
