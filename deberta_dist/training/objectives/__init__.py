"""What pre-training minimises: the networks of a run, and what stands between them.

Lower than `planning`, which asks the same networks what a run would hold and send as `training` asks them to train: so
this room within a room imports models, parallelism and the form of a batch, and nothing of a loop.
"""
