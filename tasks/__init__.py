"""The tasks by name; each is a file here and an entry in `TASKS`."""

from engine.task import Task
from models.checkpoints import Checkpoint

from .classification import Classification
from .segmentation import Segmentation
from .verification import Verification

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Segmentation, Verification)}
DEFAULT = Classification.name  # of checkpoints without a task: published ones, bare weights


def task_of(checkpoint: Checkpoint) -> type[Task]:
    """Returns the task of a checkpoint; raises ValueError for an unknown one."""
    name = checkpoint.meta.get("task", DEFAULT)
    if name not in TASKS:
        raise ValueError(f"{checkpoint.path} is of the task {name!r}, which is unknown here: {', '.join(TASKS)}")
    return TASKS[name]
