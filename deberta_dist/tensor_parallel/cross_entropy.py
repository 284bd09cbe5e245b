"""Cross entropy over a vocabulary of which every rank holds a slice; full logits exist nowhere.

For logits x and target y: loss = log sum_j exp(x_j - max) - (x_y - max). Each rank reduces its own slice;
three small all-reduces over T targets (max, sum of exponentials, target logit) join them. The gradient
softmax(x) - onehot(y) is local. Padding rows of the vocabulary are -inf and never win.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV: Tensor, labels_T: Tensor, first_row: int, vocab_size: int, group):
        # T targets, V vocabulary rows on this rank
        num_targets, num_rows = logits_TV.shape
        scores_TV = logits_TV.float()
        num_real = min(max(vocab_size - first_row, 0), num_rows)
        if num_real < num_rows:
            scores_TV = scores_TV.clone() if scores_TV is logits_TV else scores_TV
            scores_TV[:, num_real:] = float("-inf")
        local_max_T, local_best_T = scores_TV.max(dim=-1)
        max_T = local_max_T.clone()
        dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)

        local_labels_T = labels_T - first_row
        is_local_T = (local_labels_T >= 0) & (local_labels_T < num_real)
        index_T = local_labels_T.masked_fill(~is_local_T, 0)
        exponentials_TV = torch.exp(scores_TV - max_T.unsqueeze(-1))
        sums_2T = torch.stack(
            [
                exponentials_TV.sum(dim=-1),
                scores_TV.gather(-1, index_T.unsqueeze(-1)).squeeze(-1).masked_fill(~is_local_T, 0.0),
            ]
        )
        dist.all_reduce(sums_2T, group=group)
        sum_T, target_logit_T = sums_2T
        loss_T = torch.log(sum_T) - (target_logit_T - max_T)

        # The lowest id with the highest logit wins, as argmax over the whole vocabulary would say.
        no_vote = torch.iinfo(torch.int64).max
        winner_T = torch.where(local_max_T == max_T, local_best_T + first_row, no_vote)
        dist.all_reduce(winner_T, op=dist.ReduceOp.MIN, group=group)
        is_correct_T = winner_T == labels_T

        probabilities_TV = exponentials_TV.div_(sum_T.unsqueeze(-1))
        ctx.save_for_backward(probabilities_TV, index_T, is_local_T)
        ctx.dtype = logits_TV.dtype
        ctx.mark_non_differentiable(is_correct_T)
        return loss_T, is_correct_T

    @staticmethod
    def backward(ctx, gradient_T: Tensor, _):
        probabilities_TV, index_T, is_local_T = ctx.saved_tensors
        gradient_TV = probabilities_TV * gradient_T.unsqueeze(-1)
        target_T1 = (gradient_T * is_local_T).unsqueeze(-1)
        gradient_TV.scatter_add_(-1, index_T.unsqueeze(-1), -target_T1)
        return gradient_TV.to(ctx.dtype), None, None, None, None


class VocabParallelCrossEntropy(nn.Module):
    """Takes the place of the model's ``cross_entropy`` under tensor parallelism.

    Args:
        first_row: First vocabulary row on this rank.
        vocab_size: Rows of the real vocabulary (without padding).
        group: Tensor-parallel process group.

    Shapes:
        logits_TV [targets, rows on this rank], labels_T [targets] -> loss_T float32, is_correct_T bool.
    """

    def __init__(self, *, first_row: int, vocab_size: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.first_row = first_row
        self.vocab_size = vocab_size
        self.group = group

    def forward(self, logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        return _VocabParallelCrossEntropy.apply(logits_TV, labels_T, self.first_row, self.vocab_size, self.group)
