"""Text from ids as they arrive. Not here: decoding a whole list (`Vocabulary.decode`)."""

import codecs

from xushi.tokenizer.vocabulary import Vocabulary


class StreamDecoder:
    """Decodes ids one by one; holds back the bytes of an unfinished UTF-8 character.

    All returned texts together equal `Vocabulary.decode` of all ids.
    """

    def __init__(self, tokenizer: Vocabulary, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, often "" in the middle of a character."""
        return self._decoder.decode(self._tokenizer.spelling(token, self._skip_special))

    def flush(self) -> str:
        """The end of the text: an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)
