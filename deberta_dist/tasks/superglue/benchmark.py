"""SuperGLUE as a benchmark: its tasks, what they start from, its leaderboard and its submission."""

from deberta_dist.tasks.base import Benchmark
from deberta_dist.tasks.glue.mnli import MNLI
from deberta_dist.tasks.superglue.leaderboard import SOURCE, TABLE_5
from deberta_dist.tasks.superglue.submission import JsonLinesSubmission
from deberta_dist.tasks.superglue.tasks import TASKS, TRAINING_ORDER

SUPERGLUE = Benchmark(
    name="SuperGLUE",
    tasks=TASKS,
    order=tuple(task.name for task in TRAINING_ORDER),
    intermediate=(MNLI,),
    command="deepspeed launchers/finetune_superglue.sh",
    data_help="the official v2 release: its folder, or combined.zip",
    submission=JsonLinesSubmission(),
    published=TABLE_5,
    published_source=SOURCE,
)
