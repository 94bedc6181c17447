"""Episodes: a model answers an environment's tasks. Reinforcement learning and evaluation both
sample here.

An episode depends on the weights, its task and its seed alone, but for rounding that differs with
the batch. Not here: what is learned from an episode (rl), and rates over many (measure).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor

from xushi.base.errors import Failed
from xushi.base.messages import Message
from xushi.base.seeds import derive
from xushi.engine import Engine, Request, SamplingParams, generate_ids
from xushi.envs import Environment, Score, Task
from xushi.model import Deepseek
from xushi.tokenizer import Tokenizer, encode_chat, encode_outputs, parse_assistant

# Cache slots for episodes with tools, whose sequences are kept between turns. Where they need more,
# the engine moves kept ones out of the cache and back.
MOST_SLOTS = 1 << 18


@dataclass(frozen=True)
class Branch:
    """One token sequence of an episode, prompt and all. An episode whose observations come from
    tools has one; each observation of role "user" begins another.

    `sampled[i]` tells whether the model sampled `ids[i]`. The log-probabilities belong to the
    sampled tokens, in order: under the model, and under the distribution they were drawn from.
    `experts`, on request, has [MoE layers, k] for each place but the last.
    """

    ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    sampling_logprobs: list[float]
    experts: list[Tensor] | None


@dataclass(frozen=True)
class Episode:
    """One task, played to its end.

    `finish_reason` is "stop" where the environment ended it, and "length" where the model met a
    limit: of max_tokens, or of its context. `tokens` counts what was sampled in all turns.
    """

    task: Task
    transcript: list[Message]
    branches: list[Branch]
    score: Score
    finish_reason: str
    tokens: int

    @property
    def right(self) -> bool:
        """Whether the verdict is "right"."""
        return self.score.verdict == "right"

    @property
    def answer(self) -> Message:
        """The last message of the model."""
        return next(message for message in reversed(self.transcript) if message.role == "assistant")


def play(
    model: Deepseek,
    tokenizer: Tokenizer,
    environment: Environment,
    tasks: Sequence[Task],
    params: Sequence[SamplingParams],
    *,
    routing: bool = False,
    think: bool = False,
    ended: Callable[[], None] = lambda: None,
) -> list[Episode]:
    """One episode for each pair of a task and its parameters, in their order.

    `max_tokens` limits what is sampled in all turns of an episode together. Turn 0 draws with
    `seed`, turn t > 0 with derive(seed, "turn", t). Equal neighbouring tasks share the computation
    of their question. With `think` every turn is made to begin with reasoning. With `routing`
    branches have their experts. An episode that is cut off is scored as it is; the answer that was
    cut off has no content and calls no tool. `ended` is called at the end of each episode.
    """
    players = [
        _Player(tokenizer, environment, task, each, think)
        for task, each in zip(tasks, params, strict=True)
    ]
    context = model.config.max_position_embeddings
    sequences = None
    if environment.tools:
        slots = max(context, min(len(players) * context, MOST_SLOTS))
        sequences = _TurnSampler(Engine(model, tokenizer.eos_id, slots), routing)

    def take(player: _Player, request: Request) -> None:
        player.take(request, context)
        if player.finish_reason:
            ended()

    playing = players
    while playing:  # one turn of each
        if sequences is not None:
            for player, request in zip(playing, sequences.sample(playing), strict=True):
                take(player, request)
        else:
            _sample_turn(model, tokenizer, playing, routing, take)
        playing = [player for player in playing if not player.finish_reason]
    return [player.episode() for player in players]


def _sample_turn(
    model: Deepseek,
    tokenizer: Tokenizer,
    playing: Sequence["_Player"],
    routing: bool,
    take: Callable[["_Player", Request], None],
) -> None:
    """Sample the next turn of each, whose prompt is a sequence of its own."""
    generate_ids(
        model,
        [player.prompt for player in playing],
        [player.turn_params() for player in playing],
        eos_id=tokenizer.eos_id,
        routing=routing,
        finished=lambda number, request: take(playing[number], request),
    )


def examples_of(episode: Episode) -> list[tuple[list[int], list[bool]]]:
    """(ids, learned) of each branch, as `pack_examples` takes them: the sampled tokens are
    learned.
    """
    return [(branch.ids, branch.sampled) for branch in episode.branches]


class _Player:
    """One episode in progress: it takes each turn's request and has the prompt of the next one."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        environment: Environment,
        task: Task,
        params: SamplingParams,
        think: bool,
    ) -> None:
        self.task = task
        self.finish_reason = ""
        self.extends = False  # whether the next prompt goes on from the last request
        self._tokenizer = tokenizer
        self._environment = environment
        self._params = params
        self._forced = [tokenizer.think_id] if think else []
        self._branches: list[Branch] = []
        self._turn = 0
        self._tokens = 0
        question = environment.reply(task, ())
        if question is None:
            raise Failed(
                f"environment {environment.name} asks nothing in task {task.index} of split "
                f"{task.split}",
                "its reply(task, ()) must give the question; see xushi env check",
            )
        self._transcript = [question]
        self.prompt = self._render(self._transcript)

    def turn_params(self) -> SamplingParams:
        """Those of the next turn: its own seed, and of max_tokens what is left."""
        if self._turn == 0:
            return self._params
        return replace(
            self._params,
            seed=derive(self._params.seed, "turn", self._turn),
            max_tokens=self._params.max_tokens - self._tokens,
        )

    def take(self, request: Request, context: int) -> None:
        """Add what was sampled, and the environment's reply to it."""
        self._grow(request)
        self._turn += 1
        self._tokens += len(request.token_ids)
        ids = [*self._forced, *request.token_ids]
        answer, finished = parse_assistant(self._tokenizer, ids)
        if not finished:
            self._transcript.append(replace(answer, content="", tool_calls=()))
            self.finish_reason = "length"
            return
        self._transcript.append(answer)
        observation = self._environment.reply(self.task, tuple(self._transcript))
        if observation is None:
            self.finish_reason = "stop"
            return
        self._observe(observation, context)

    def episode(self) -> Episode:
        """The finished episode with its score."""
        return Episode(
            self.task,
            self._transcript,
            self._branches,
            self._environment.score(self.task, tuple(self._transcript)),
            self.finish_reason,
            self._tokens,
        )

    def _observe(self, observation: Message, context: int) -> None:
        """Make the next prompt, unless nothing is left for an answer to it.

        A tool's output is added to what was sampled, which is never rendered again: its text could
        become other tokens.
        """
        self.extends = observation.role == "tool"
        if self.extends:
            added = encode_outputs(self._tokenizer, [observation])
            self.prompt = [*self._branches[-1].ids, *added, *self._forced]
        else:
            self.prompt = self._render([*self._transcript, observation])
        if len(self.prompt) >= context or self._tokens >= self._params.max_tokens:
            self.finish_reason = "length"  # the model never sees the observation
        else:
            self._transcript.append(observation)

    def _grow(self, request: Request) -> None:
        """Put the prompt and what was sampled into a branch: the last one where it was extended."""
        if not self.extends:
            self._branches.append(Branch([], [], [], [], None))
        branch = self._branches[-1]
        given = request.prompt_ids[len(branch.ids) :]
        branch.ids.extend([*given, *request.token_ids])
        branch.sampled.extend([False] * len(given) + [True] * len(request.token_ids))
        branch.logprobs.extend(request.logprobs)
        branch.sampling_logprobs.extend(request.sampling_logprobs)
        self._branches[-1] = replace(branch, experts=request.routed_experts)

    def _render(self, transcript: Sequence[Message]) -> list[int]:
        return [
            *encode_chat(self._tokenizer, transcript, self._environment.tools),
            *self._forced,
        ]


class _TurnSampler:
    """Samples turns of episodes whose sequences stay with the engine between turns."""

    def __init__(self, engine: Engine, routing: bool) -> None:
        self._engine = engine
        self._routing = routing
        self._last: dict[_Player, Request] = {}

    def sample(self, playing: Sequence[_Player]) -> list[Request]:
        """The next turn of each. Sequences that no player goes on with are given back."""
        goes_on = [player for player in playing if player.extends]
        for player in [player for player in self._last if player not in goes_on]:
            self._engine.release(self._last.pop(player))
        begins = [player for player in playing if not player.extends]
        for prompt, group in groupby(begins, key=lambda player: player.prompt):
            members = list(group)
            params = [player.turn_params() for player in members]
            requests = self._engine.add_group(prompt, params, self._routing, keep=True)
            self._last |= dict(zip(members, requests, strict=True))
        for player in goes_on:
            last = self._last[player]
            more = player.prompt[len(last.prompt_ids) + len(last.token_ids) :]
            self._last[player] = self._engine.extend(last, more, player.turn_params())
        while self._engine.has_work:
            self._engine.step()
        return [self._last[player] for player in playing]
