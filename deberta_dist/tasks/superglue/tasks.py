"""The eight tasks and two diagnostics of SuperGLUE, by name and in the order of training."""

from collections.abc import Mapping

from deberta_dist.tasks.superglue.copa import COPA
from deberta_dist.tasks.superglue.multirc import MULTIRC
from deberta_dist.tasks.superglue.pairs import AX_B, AX_G, BOOLQ, CB, RTE
from deberta_dist.tasks.superglue.record import RECORD
from deberta_dist.tasks.superglue.task import SuperGlueTask
from deberta_dist.tasks.superglue.wic import WIC
from deberta_dist.tasks.superglue.wsc import WSC

TASKS: Mapping[str, SuperGlueTask] = {task.name: task for task in (BOOLQ, CB, COPA, MULTIRC, RECORD, RTE, WIC, WSC, AX_B, AX_G)}
"""By name, in the order of the leaderboard; the diagnostics last."""
MAIN_TASKS = tuple(name for name, task in TASKS.items() if not task.is_diagnostic)
TRAINING_ORDER = (RTE, CB, COPA, WSC, BOOLQ, WIC, MULTIRC, RECORD)
"""Natural language inference first, then the small tasks, then the long ones."""
