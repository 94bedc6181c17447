"""The one training loop: restore, step, record, evaluate, save, and go back where the loss jumps.

Killed anywhere and started again it ends with the same bits: everything that a step depends on is
in the checkpoint or is a function of the step's number. Not here: what a step computes (step).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import safetensors.torch

from xushi.base.errors import BadInput, Failed
from xushi.base.files import write_atomic
from xushi.base.interrupt import StopRequest, finish_step_first
from xushi.base.progress import StepProgress, say
from xushi.base.tracking import BatchRecord, Tracking
from xushi.model import Batch, Deepseek
from xushi.train.checkpoint import Checkpoint, CheckpointWriter
from xushi.train.guards import LIMIT_IN_A_ROW, LIMIT_OF_ROLLBACKS, Problem
from xushi.train.heartbeat import Heartbeat
from xushi.train.layout import Layout
from xushi.train.speed import Speed
from xushi.train.state import TrainingState, agreed_checkpoint
from xushi.train.step import Step, StepResult

START_OVER = "run with --update (it starts the stage over and deletes its checkpoints)"


class Evaluation(Protocol):
    """A measurement on the model in training, such as bits per byte of held-out text."""

    @property
    def every(self) -> int:
        """Steps from one measurement to the next; there is one after the last step too."""

    def measure(self) -> dict[str, float]:
        """Figures to track. All processes call it together and return the same."""


class Replayed(NamedTuple):
    """A step computed again, and the number of steps of the checkpoint that this started from."""

    result: StepResult
    trained_from: int


class Training:
    """One stage's training of `model`, in place; checkpoints go to `directory`.

    With a `layout` all its processes make one alike and call the same methods; afterwards each has
    its shards of the model.
    """

    def __init__(
        self,
        stage: str,
        model: Deepseek,
        step: Step,
        directory: Path,
        tracking: Tracking,
        layout: Layout | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        self.stage = stage
        self.step = step
        self.config = step.config
        self.directory = directory
        self.tracking = tracking
        self.evaluation = evaluation
        self.state = TrainingState.begin(model, step.config, layout)
        self.layout = self.state.layout
        self._rollbacks = Counter[int]()

    def run(self) -> dict[str, float]:
        """Train until `config.steps` steps are done or the step says stop.

        Returns the last step's figures; {} if the checkpoint has all steps already. Ctrl-C
        finishes the running step, saves and raises KeyboardInterrupt. Raises `Failed` if a process
        died, or if the guards give up.
        """
        # Signals are held back until it is known who died: torchrun sends one to the survivors.
        with finish_step_first() as stop, Heartbeat(self.layout.team, self._report_lost) as heart:
            try:
                return self._run_steps(heart, stop)
            except RuntimeError as error:  # what torch raises when a process does not answer
                if not (lost := heart.who_is_gone()):
                    raise
                raise Failed(
                    f"{self.stage}: {lost} died",
                    "run the same command again: it goes on from the last checkpoint, with as many "
                    "processes as you start",
                ) from error

    def replay(self, records: Sequence[BatchRecord]) -> Replayed:
        """Compute the step of the last record again, from the last checkpoint before it.

        `records` are those of steps 1 to the wanted one, as `Tracking.batches` gives them. Nothing
        is saved or tracked. Raises `Failed` if a batch is not the one that was trained on.
        """
        last = records[-1].step
        first = self._restore(up_to=last - 1)
        if records[0].step > first + 1:
            raise BadInput(
                f"the tracking store has nothing before step {records[0].step} of stage "
                f"{self.stage}, and the last checkpoint before that is of step {first}",
                "--no-loss shows the step's data",
            )
        with StepProgress("replay", last, first) as progress:
            for record in records[first + 1 - records[0].step :]:
                self.state.cursor = record.cursor
                result = self.step.take(self.state, record.step - 1, lambda _: None)
                if result.hash != record.hash:
                    raise Failed(
                        f"the batch of step {record.step} is not the one that was trained on: its "
                        "hash differs",
                        "the run's data, tokenizer or number of processes was another; --no-loss "
                        "shows what is there now",
                    )
                progress.update(record.step, result.note)
        return Replayed(result, first)

    def _run_steps(self, heart: Heartbeat, stop: StopRequest) -> dict[str, float]:
        number = first = self._restore()
        speed = Speed(self.state)
        figures: dict[str, float] = {}
        with (
            StepProgress(self.stage, self.config.steps, first, self.layout.is_first) as progress,
            self._writer() as writer,
        ):
            if number == 0 and self.config.on_spike == "rollback":
                writer.save(self._checkpoint(0))  # so that there is always one to go back to
            while number < self.config.steps and not self.state.stopped:
                result, figures, stops = self._take(number, heart, speed, stop)
                number += 1
                figures |= self._evaluated(number, heart)
                self.tracking.metrics(self.stage, number, figures)
                progress.update(number, _note(result.note, figures))
                heart.at(number, "save")
                number = self._conclude(number, result, stops, writer)
                if stops:
                    raise KeyboardInterrupt
        if self._all_told(stop):  # asked for while the last step was evaluated and saved
            raise KeyboardInterrupt
        return figures

    def _take(
        self, number: int, heart: Heartbeat, speed: Speed, stop: StopRequest
    ) -> tuple[StepResult, dict[str, float], bool]:
        """Step `number`, recorded: its result, its figures, and whether to stop after it."""
        speed.begin_step()
        heart.at(number, "batch")
        cursor = self.state.cursor
        result = self.step.take(self.state, number, lambda phase: heart.at(number, phase))
        stops = self._all_told(stop)
        self.state.cursor += result.items
        problem = result.problem.text if result.problem else ""
        self.tracking.batch(self.stage, number + 1, cursor, result.items, result.hash, problem)
        return result, result.figures | speed.figures(result.figures, result.flops), stops

    def _all_told(self, stop: StopRequest) -> bool:
        """Whether any process was asked to stop."""
        return any(self.layout.team.gather(stop.requested))

    def _evaluated(self, number: int, heart: Heartbeat) -> dict[str, float]:
        """The evaluation's figures after `number` steps, if it is due."""
        if self.evaluation is None:
            return {}
        if number % self.evaluation.every and number != self.config.steps:
            return {}
        heart.at(number, "evaluate")
        return self.evaluation.measure()

    def _conclude(
        self, number: int, result: StepResult, stops: bool, writer: CheckpointWriter
    ) -> int:
        """Report what was wrong, then go back or save; returns the number of steps now done."""
        problem = result.problem
        if problem is not None:
            self._report_problem(number, problem, result.batch)
            if problem.kind == "spike" and self.config.on_spike == "rollback":
                # Nothing is saved: from that state the same steps would lead here again.
                return self._roll_back(number, writer)
        self.state.stopped = result.stop
        due = number % self.config.checkpoint_every == 0 or number == self.config.steps
        if due or stops or result.stop:
            writer.save(self._checkpoint(number))
        if result.stop:
            self._say(f"{self.stage}: {result.stop}; stopped after {number} steps")
            self.tracking.event(self.stage, "stopped_early", step=number, reason=result.stop)
        return number

    def _roll_back(self, number: int, writer: CheckpointWriter) -> int:
        """Go back to the last checkpoint and skip the data from there to here; returns its step."""
        reached = self.state.cursor
        writer.finish()
        back = self._restore()
        self._rollbacks[back] += 1
        if self._rollbacks[back] > LIMIT_OF_ROLLBACKS:
            raise Failed(
                f"{self.stage} step {number}: the loss jumps after {LIMIT_OF_ROLLBACKS} returns "
                f"to step {back}",
                'lower learning_rate, or set on_spike = "warn" if the data itself changes there, '
                f"and {START_OVER}",
            )
        self.tracking.event(
            self.stage,
            "rollback",
            from_step=number,
            to_step=back,
            skipped_from=self.state.cursor,
            skipped_to=reached,
        )
        self._say(
            f"{self.stage}: back to step {back}; the data from there to step {number} is skipped"
        )
        self.state.cursor = reached
        return back

    def _report_problem(self, number: int, problem: Problem, batch: Batch) -> None:
        """Say and record it; raise `Failed` if too many steps in a row had no update."""
        guard = self.state.guard
        withheld = guard.withholds(problem)
        consequence = "; its update is left out" if withheld else ""
        self._say(f"{self.stage} step {number}: {problem.text}{consequence}")
        kind = problem.kind.replace(" ", "_")
        self.tracking.event(self.stage, kind, step=number, text=problem.text, withheld=withheld)
        if guard.in_a_row >= LIMIT_IN_A_ROW:
            file = self._save_refused(number, batch)
            raise Failed(
                f"{self.stage} step {number}: {problem.text}; {LIMIT_IN_A_ROW} steps in a row have "
                "had no update",
                f"the batch is saved in {file}, checkpoints before it are in {self.directory}. To "
                f"retry, lower learning_rate or raise warmup_steps, and {START_OVER}",
            )

    def _save_refused(self, number: int, batch: Batch) -> Path:
        """Write this process's rows of a batch beside the checkpoints, for a person to look at."""
        layout = self.layout
        part = "" if layout.data == 1 else f"-rows-of-process-{layout.rank}"
        file = self.directory.parent / f"refused-{self.stage}-step-{number:09d}{part}.safetensors"
        if layout.stage == 0:  # the later stages have the same rows
            tensors = {name: tensor.contiguous() for name, tensor in batch._asdict().items()}
            write_atomic(file, safetensors.torch.save(tensors))
        return file

    def _restore(self, up_to: int | None = None) -> int:
        """Go back to the newest checkpoint, of step `up_to` at most; returns the steps done."""
        found = agreed_checkpoint(self.directory, self.layout, up_to)
        number = self.state.restore(found)
        self.step.load(found.state["step"] if found else {})
        return number

    def _checkpoint(self, number: int) -> Checkpoint:
        return self.state.checkpoint(number, self.step.saved())

    def _writer(self) -> CheckpointWriter:
        config = self.config
        return CheckpointWriter(
            self.directory, config.keep_checkpoints, config.keep_every, self.layout.writers
        )

    def _report_lost(self, text: str) -> None:
        self.tracking.event(self.stage, "process_lost", text=text)
        say(
            f"{self.stage}: {text}; the run ends, and the same command goes on from the last "
            "checkpoint"
        )

    def _say(self, text: str) -> None:
        if self.layout.is_first:
            say(text)


def _note(note: str, figures: dict[str, float]) -> str:
    """The progress line's note with the speed behind it."""
    if "tokens_per_second" not in figures:
        return note
    return f"{note}  {figures['tokens_per_second']:,.0f} tok/s"
