"""The tokenizer stage: a vocabulary is trained on the training text, and the corpus is encoded."""

from typing import TYPE_CHECKING

from xushi.data import load_manifest, load_summary, obtain_tokenizer, obtain_tokens
from xushi.run.place import RunPlace
from xushi.run.stages.base import Costs, Fact, Results, Stage
from xushi.tokenizer.config import smallest_vocabulary

if TYPE_CHECKING:
    from xushi.run.recipe import Recipe


class TokenizerFigures(Results):
    """The vocabulary. `bytes_per_token` is measured on the held-out text."""

    vocab_size: int
    sha256: str
    bytes_per_token: float


class TokenFigures(Results):
    """The corpus in tokens."""

    train_tokens: int
    heldout_tokens: int


class TokenizerResults(Results):
    """What the tokenizer stage returns."""

    tokenizer: TokenizerFigures
    data: TokenFigures


class TrainTokenizer(Stage):
    """Reads data/corpus; writes tokenizer/ and data/tokens. Left out, every byte is a token.

    The vocabulary has tokens for tool calls only if the environment declares tools.
    """

    name = "tokenizer"
    title = "Tokenizer"
    section = "data"
    required = True
    facts = (
        Fact("tokenizer.vocab_size", "{} tokens in the vocabulary"),
        Fact("tokenizer.bytes_per_token", "{} bytes of text in one token", "digits"),
    )

    def __init__(self, recipe: "Recipe") -> None:
        environment = recipe.environment
        self.tools = environment is not None and bool(environment.make().tools)
        self.sequence_length = recipe.data.sequence_length
        self.vocab_size = smallest_vocabulary(self.tools)
        if recipe.runs(self.name):
            self.vocab_size = recipe.tokenizer.vocab_size

    @classmethod
    def wanted(cls, recipe: "Recipe") -> bool:
        """Always: left out as a control, the vocabulary has the single bytes only."""
        return True

    def seconds(self, costs: Costs) -> float:
        """As measured on a part of the text."""
        return costs.tokenizer

    def run(self, place: RunPlace) -> TokenizerResults:
        """Train the tokenizer and write the corpus as tokens, or link what another run made."""
        obtain_tokenizer(place.corpus, self.vocab_size, place.path("tokenizer"), self.tools)
        trained = place.tokenizer()
        obtain_tokens(place.corpus, trained, self.sequence_length, place.tokens)
        manifest = load_manifest(place.tokens)
        heldout_bytes = load_summary(place.corpus).heldout_bytes
        return TokenizerResults(
            tokenizer=TokenizerFigures(
                vocab_size=trained.vocab_size,
                sha256=trained.hash,
                bytes_per_token=heldout_bytes / max(1, manifest.heldout.tokens),
            ),
            data=TokenFigures(
                train_tokens=sum(source.tokens for source in manifest.train),
                heldout_tokens=manifest.heldout.tokens,
            ),
        )
