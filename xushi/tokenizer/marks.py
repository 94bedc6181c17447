"""What a message spells must not become a special token: such tokens are marked before a template
is rendered, and encoded as ordinary characters afterwards.

Not here: rendering (rendering.py), which values a template gets (conversation.py).
"""

import re
from collections.abc import Mapping
from typing import Any

from xushi.tokenizer.published import PublishedTokenizer

# Around a special token that a message spells, and after a text that is to go on. Noncharacters of
# Unicode, which no text for interchange has.
_OPEN, _CLOSE, END = "\ufdd0", "\ufdd1", "\ufdd2"
_NO_MARKS = dict.fromkeys(map(ord, (_OPEN, _CLOSE, END)))


class Marks:
    """The marks for conversations that one template writes. Two texts that a template joins without
    anything between them can still form a token together.
    """

    def __init__(self, tokenizer: PublishedTokenizer, template: str) -> None:
        self._tokenizer = tokenizer
        # The longest first, since one may begin another.
        tokens = sorted(tokenizer.control_tokens(template), key=len, reverse=True)
        either = "|".join(map(re.escape, tokens)) or "(?!)"
        self._tokens = re.compile(either)
        self._marked = re.compile(f"{_OPEN}({either}){_CLOSE}|[{_OPEN}{_CLOSE}]")

    def put(self, value: Any) -> Any:
        """`value` with marks around each of the tokens in its strings and keys.

        A key that is a plain word stays: templates look such keys up.
        """
        if isinstance(value, str):
            return self._put_in_text(value)
        if isinstance(value, Mapping):
            return {self._put_in_key(key): self.put(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.put(each) for each in value]
        return value

    def _put_in_key(self, key: Any) -> Any:
        return key if isinstance(key, str) and key.isidentifier() else self.put(key)

    def _put_in_text(self, text: str) -> str:
        text = text.translate(_NO_MARKS)
        normalised = self._tokenizer.normalised(text)
        # The tokenizer would find a token that the text spells in other characters.
        if self._tokens.findall(normalised) != self._tokens.findall(text):
            text = normalised
        return self._tokens.sub(f"{_OPEN}\\g<0>{_CLOSE}", text)

    def encode(self, rendered: str) -> list[int]:
        """Ids of a rendered conversation. A marked token becomes ordinary characters. A template
        may have cut a text between two marks: a mark that is left alone only separates what is
        around it.
        """
        ids: list[int] = []
        for number, part in enumerate(self._marked.split(rendered)):
            if part:
                encode = self._tokenizer.encode_text if number % 2 else self._tokenizer.encode
                ids += encode(part)
        return ids
