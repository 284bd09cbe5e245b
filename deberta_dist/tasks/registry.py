"""The benchmark that the verbs work on; the one place outside its folder that names it."""

from deberta_dist.tasks.superglue.benchmark import SUPERGLUE

DEFAULT = SUPERGLUE
