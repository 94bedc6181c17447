"""Files outside of the run directory that a finished stage has read, and that changed since.

Not here: how a stage compares its files (`Stage.files_changed`).
"""

from collections.abc import Sequence

from xushi.base.errors import BadInput
from xushi.base.progress import say
from xushi.run.place import RunPlace
from xushi.run.stages import Stage, finished_stages


def stages_to_run_again(stages: Sequence[Stage], place: RunPlace, update: bool) -> list[str]:
    """The first finished stage whose files changed, and all after it; of a run that is not finished
    only with `update`. What changed is told, and what is wrong with the new files is raised.
    """
    finished = finished_stages(stages, place)
    again = update or len(finished) == len(stages)
    for number, stage in enumerate(stages):
        if stage.name in finished and _runs_again(stage, place, again, update):
            stage.prepare_again(place)
            return [each.name for each in stages[number:]]
    return []


def _runs_again(stage: Stage, place: RunPlace, again: bool, update: bool) -> bool:
    """Whether a finished stage runs again, where `again` allows it."""
    try:
        changed = stage.files_changed(place)
    except BadInput as error:
        if update:
            raise
        say(f"{stage.name}: {error.problem}; what was read before is used")
        return False
    if not changed:
        return False
    goes_on = "; this run goes on with what it has read, and --update reads them again"
    say(f"{stage.name}: the files are not as they were read: {changed}{'' if again else goes_on}")
    return again
