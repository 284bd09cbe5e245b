"""What pre-training minimises: the networks of a run and the relations between them.

`planning` asks the same networks what a run would hold and send that `training` asks to train. So this room is below both: it
imports models, parallelism and the form of a batch, and nothing of a loop.
"""
