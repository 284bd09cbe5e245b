"""ZeRO stage 3 under a pipeline: the weight store. The only door to deepspeed.

DeepSpeed's ZeRO-3 gathers weights and reduces gradients in every micro-batch, which is why its own pipeline
engine refuses it. Here the two are apart in time. The engine's model is not the transformer but a store of flat
parameters, which it gathers and reduces once per optimizer step, whatever the number of micro-batches:

    gather     all-gathers the owned flat weights over the data-parallel group (once)
               ... all micro-batches run on plain modules whose parameters are views of the gathered weights,
               ... and their gradients accumulate in float32 views of one flat buffer
    reduce     passes the accumulated gradient through one ``engine.backward`` (one reduce-scatter) and computes its norm
    apply      once the host has read the norm: ``engine.step`` does clipping, loss scale, master weights, offload and Adam,
               or skips the step if the norm is not finite

The weights stay gathered from ``gather`` to ``reduce``, so the engine's own hooks find them present and gather nothing again.
"""

from deberta_dist.parallel.zero.weight_store import WeightStore, import_deepspeed

__all__ = ["WeightStore", "import_deepspeed"]
