"""BatchNorm whose statistics are those of all processes' rows."""
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce


def several_processes():
    return dist.is_initialized() and dist.get_world_size() > 1


def over_processes(x):
    """The sum of x over all processes, and of its gradients: all must call it in step."""
    return all_reduce(x) if several_processes() else x


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d on rows [N, C] whose training statistics are those of all processes' rows.

    With one process, and in eval(), it is nn.BatchNorm1d. With several (an initialised
    torch.distributed) it normalises as one process with the whole batch would, on the CPU too,
    where nn.SyncBatchNorm refuses. All processes must then call it in step, forward and backward.
    """

    def forward(self, x):
        """[N, C] -> [N, C], in x's dtype."""
        if not (self.training and several_processes()):
            return super().forward(x)
        rows = x.to(self.weight.dtype)
        count, mean, centred = moments(rows)
        var = over_processes(centred.square().sum(0)) / count
        self.track(count, mean, var)
        return (centred * torch.rsqrt(var + self.eps) * self.weight + self.bias).to(x.dtype)

    def after(self, linear, x):
        """Fold this BatchNorm into the `linear` (without bias) before it: weight and bias.

        x: [N, Cin], N > 1, the rows that `linear` gets. Returns weight [C, Cin] and bias [C] of the
        one linear layer that gives what both give on x. In training the statistics of linear(x)
        come from mean and covariance of x: W mean, and the diagonal of W cov W'. So linear(x)
        [N, C] is never made for them.
        """
        mean, var = self.running_mean, self.running_var
        if self.training:
            count, x_mean, centred = moments(x.to(self.weight.dtype))
            # Sums of products, not matrix products, which autocast would round
            products = (centred.unsqueeze(2) * centred.unsqueeze(1)).sum(0)
            cov = over_processes(products) / count                           # [Cin, Cin]
            mean = (linear.weight * x_mean).sum(1)                           # [C]
            pairs = linear.weight.unsqueeze(2) * linear.weight.unsqueeze(1)  # [C, Cin, Cin]
            var = (pairs * cov).sum((1, 2)).clamp(min=0)                     # [C]
            self.track(count, mean, var)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return scale.unsqueeze(1) * linear.weight, self.bias - scale * mean

    @torch.no_grad()
    def track(self, count, mean, var):
        """Move the running statistics towards those of a batch.

        `var` has `count`, the number of rows, in its denominator.
        """
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * count / (count - 1), self.momentum)


def moments(rows):
    """Number and mean [C] of all processes' rows, and this process' rows minus that mean [N, C]."""
    # First the mean, then what is around it: E[x²] - E[x]² loses everything where the mean is
    # large (metres). Each process counts its own rows: shards need not be equal.
    total = over_processes(torch.cat([rows.sum(0), rows.new_full((1,), len(rows))]))
    count = total[-1].detach()
    mean = total[:-1] / count
    return count, mean, rows - mean
