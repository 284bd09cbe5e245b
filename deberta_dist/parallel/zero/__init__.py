"""ZeRO stage 3 under a pipeline: the weight store. The only door to deepspeed.

DeepSpeed's ZeRO-3 gathers weights and reduces gradients in every micro-batch, which is why its own pipeline
engine refuses it. Here the two are kept apart in time. The engine's model is not the transformer but a
store of flat parameters, and it is met twice per optimizer step, however many micro-batches there are:

    gather     all-gather the flat weights of the stage over the data-parallel group (once)
               ... all micro-batches run on plain modules whose parameters are views of the gathered weights,
               ... their gradients accumulating in float32 views of one flat buffer
    reduce     the accumulated gradient goes through one ``engine.backward`` (one reduce-scatter), and its norm is made
    apply      the host has read the norm: ``engine.step`` does clipping, loss scale, master weights, offload and Adam, or
               declines a norm that is not finite

The weights stay gathered from the first meeting to the second, so the engine's own hooks find them present
and gather nothing again.
"""

from deberta_dist.parallel.zero.weight_store import WeightStore, import_deepspeed

__all__ = ["WeightStore", "import_deepspeed"]
