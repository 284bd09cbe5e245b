"""SuperGLUE as a benchmark: its tasks, what they start from, its leaderboard and its submission."""

from deberta_dist.tasks.base import Benchmark, PublishedScores
from deberta_dist.tasks.glue.mnli import MNLI
from deberta_dist.tasks.superglue.submission import JsonLinesSubmission
from deberta_dist.tasks.superglue.tasks import MAIN_TASKS, TASKS, TRAINING_ORDER

_SOURCE = "arXiv 2006.03654, Table 5"


def _row(name: str, average: float, *values: tuple[float, ...]) -> PublishedScores:
    """Values by task in the order of MAIN_TASKS, and within a task in the order of its metrics."""
    pairs = zip(MAIN_TASKS, values, strict=True)
    return PublishedScores(name, {task: dict(zip(TASKS[task].metrics, found, strict=True)) for task, found in pairs}, average)


# Test split; the paper, Table 5.
TABLE_5 = (
    #                                  BoolQ    CB F1/Acc     COPA      MultiRC F1a/EM ReCoRD F1/EM  RTE      WiC      WSC
    _row("RoBERTa-large", 84.6,       (87.1,), (90.5, 95.2), (90.6,),  (84.4, 52.5), (90.6, 90.0), (88.2,), (69.9,), (89.0,)),
    _row("T5-11B", 89.3,              (91.2,), (93.9, 96.8), (94.8,),  (88.1, 63.3), (94.1, 93.4), (92.5,), (76.9,), (93.8,)),
    _row("T5 + Meena", 90.2,          (91.3,), (95.8, 97.6), (97.4,),  (88.3, 63.0), (94.2, 93.5), (92.7,), (77.9,), (95.9,)),
    _row("Human", 89.8,               (89.0,), (95.8, 98.9), (100.0,), (81.8, 51.9), (91.7, 91.3), (93.6,), (80.0,), (100.0,)),
    _row("DeBERTa 1.5B + SiFT", 89.9, (90.4,), (94.9, 97.2), (96.8,),  (88.2, 63.7), (94.5, 94.1), (93.2,), (76.4,), (95.9,)),
    _row("DeBERTa ensemble", 90.3,    (90.4,), (95.7, 97.6), (98.4,),  (88.2, 63.7), (94.5, 94.1), (93.2,), (77.5,), (95.9,)),
)  # fmt: skip

SUPERGLUE = Benchmark(
    name="SuperGLUE",
    tasks=TASKS,
    order=tuple(task.name for task in TRAINING_ORDER),
    intermediate=(MNLI,),
    command="deepspeed launchers/finetune_superglue.sh",
    data_help="the official v2 release: its folder, or combined.zip",
    submission=JsonLinesSubmission(),
    published=TABLE_5,
    published_source=_SOURCE,
)
