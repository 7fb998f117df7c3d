"""The maths of DINO, CrIBo and S3PT, each of which contains the one before.

A student learns to say of a crop what its teacher, an average of the student over time, says of
another crop of the same picture. Both answer with probabilities over prototypes: DINO of the whole
crop, CrIBo also of its objects (s3pt/clustering.py finds them). S3PT (Sec. 3.1) takes a prototype's
length for how sure it is: the probabilities are those of a von Mises-Fisher mixture.

Symbols: R rows (crops or objects), K prototypes, D width of the encoder, p of the head's output.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.training import gather_rows, share, sum_over_processes
from s3pt.clustering import in_float32

# Logits in memory at the same time: 64 rows of 65 536 prototypes on a CPU, 512 on a GPU
AT_ONCE = {"cpu": 2**22, "cuda": 2**25}


# ---- von Mises-Fisher ----------------------------------------------------------------------------

def vmf_log_constant(kappa, dim):
    """log C_p(kappa) - log C_p(0), with which a vMF density on the sphere of R^p integrates to 1.

    S3PT, Eq. 2: C_p(kappa) = kappa^nu / ((2 pi)^(p/2) I_nu(kappa)), nu = p/2 - 1. The Bessel
    function is Debye's uniform expansion with two terms, put so that nothing cancels: value and
    gradient are 0 at kappa = 0, and large kappa do not overflow. The error is 1e-8 for p = 256 and
    5e-6 for p = 32. What does not depend on kappa, softmax takes away.

    kappa: [...] of any shape, at least 0. dim: p. Returns: [...].
    """
    nu = dim / 2 - 1
    r = (nu**2 + kappa**2).sqrt()
    q = kappa**2 / (r + nu)  # r - nu
    terms = torch.log1p(_debye(nu / r, nu))
    at_zero = torch.log1p(_debye(torch.ones_like(kappa), nu))  # rounded as the terms are
    return nu * torch.log1p(q / (2 * nu)) - q + torch.log1p(q / nu) / 2 - terms + at_zero


def _debye(t, nu):
    """The two terms of Debye's expansion after the leading 1."""
    first = (3 * t - 5 * t**3) / (24 * nu)
    second = (81 * t**2 - 462 * t**4 + 385 * t**6) / (1152 * nu**2)
    return first + second


# ---- the head ------------------------------------------------------------------------------------

class Prototypes(nn.Module):
    """A head's last layer: K prototypes w = g v / |v|, and the logits of points on the sphere.

    vmf: whether a prototype's length says how sure it is (S3PT, Eq. 2). unit: whether all lengths
    stay 1. The names of the parameters are those of DINO's release.
    """

    def __init__(self, dim, count, vmf=False, unit=False):
        super().__init__()
        self.vmf = vmf
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not unit)
        self.weight_v = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach())

    def layer(self, temperature):
        """The weight [K, p] and bias [K] of the linear layer that gives the logits."""
        v, kappa, bias = self.parts(temperature)
        return kappa[:, None] * F.normalize(v, dim=1), bias

    def parts(self, temperature):
        """v [K, p], kappa [K] and bias [K] of the logits kappa (v / |v|) z + bias."""
        kappa = self.weight_g[:, 0] / temperature  # the length of w / temperature
        bias = torch.zeros_like(kappa)
        if self.vmf:
            bias = vmf_log_constant(kappa.abs(), self.weight_v.shape[1])
        return self.weight_v, kappa, bias

    def norms(self):
        """The least, the median and the largest length of a prototype."""
        lengths = self.weight_g.detach().abs()
        return [lengths.min().item(), lengths.median().item(), lengths.max().item()]

    def forward(self, z, temperature):
        """Unit vectors [..., p] to the logarithms, up to a constant, of probabilities [..., K]."""
        return F.linear(z, *self.layer(temperature))


class Head(nn.Module):
    """DINO's head: three layers to a point on the sphere of R^p, and prototypes there.

    `last_layer` has the prototypes of crops, `last_layer_c` those of objects (CrIBo), which is None
    where there are none.

    dim: D. hidden: width of the inner layers. bottleneck: p. options: of `Prototypes`.
    """

    def __init__(self, dim, hidden, bottleneck, prototypes, objects=True, **options):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                 nn.GELU(), nn.Linear(hidden, bottleneck))
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck, prototypes, **options)
        self.last_layer_c = Prototypes(bottleneck, prototypes, **options) if objects else None

    def forward(self, x):
        """Features [..., D] of crops or of objects to unit vectors [..., p], in float32."""
        return F.normalize(self.mlp(x).float(), dim=-1)


# ---- targets -------------------------------------------------------------------------------------

class Center(nn.Module):
    """What keeps a teacher from giving one prototype always: a moving average is taken away.

    kind: of what the average is. "logits" (DINO) is of the logits. "probability" (S3PT, after
    DINO-vMF) is of the probabilities, and is kept as logarithms: with momentum 0 each prototype
    then has the same share of a batch, up to a row's normalisation. It is not a mean of logarithms,
    which the prototypes that nobody uses would carry off to minus infinity.
    """

    def __init__(self, count, kind, momentum=0.9):
        super().__init__()
        self.kind = kind
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(count))

    def targets(self, logits, temperature):
        """A teacher's logits [..., K] at its temperature to its probabilities [..., K]."""
        value = self.value / temperature if self.kind == "logits" else self.value
        return F.softmax(logits - value, dim=-1)

    @torch.no_grad()
    def update(self, z, prototypes, temperature):
        """Move the average to the teacher's projections [R, p] of all processes. All call this."""
        count = sum_over_processes(torch.tensor(float(len(z)), device=z.device))
        if count == 0:
            return
        # Sums over the rows, of the logits or of the probabilities; the latter as logarithms
        total = torch.zeros_like(self.value)
        log_total = torch.full_like(self.value, -math.inf)
        layer = prototypes.layer(temperature)
        for rows in in_parts(z, len(self.value)):
            logits = F.linear(z[rows], *layer)  # [r, K]
            if self.kind == "logits":
                total += logits.sum(0)
            else:
                log_total = torch.logaddexp(log_total, F.log_softmax(logits, 1).logsumexp(0))
        # Over the processes
        if self.kind == "logits":
            mean = sum_over_processes(total) / count * temperature
        else:
            mean = gather_rows(log_total[None]).logsumexp(0) - count.log()
        self.value.lerp_(mean, 1 - self.momentum)


def in_parts(rows, width):
    """Slices of the rows [R, ...] of which each gives at most AT_ONCE numbers [r, width]."""
    length = max(1, AT_ONCE["cpu" if rows.device.type == "cpu" else "cuda"] // width)
    return [slice(start, start + length) for start in range(0, len(rows), length)]


# ---- losses --------------------------------------------------------------------------------------

class Target:
    """What the teacher says, for the rows of a student: made in parts, when they are asked for.

    z: the teacher's projections [R, p], or [R, n, p] for the mean of n answers. weights: [R] of the
    rows' cross-entropies in the loss.
    """

    def __init__(self, z, weights, prototypes, center, temperature):
        self.z = z
        self.weights = weights
        v, kappa, bias = prototypes.parts(temperature)
        self.layer = v, kappa / torch.linalg.vector_norm(v, dim=1), bias
        self.center = center
        self.temperature = temperature

    def probabilities(self, rows):
        """Of these rows (a slice): [r, K]."""
        target = self.center.targets(logits_of(self.z[rows], *self.layer), self.temperature)
        return target.mean(1) if target.ndim == 3 else target


def logits_of(z, v, scale, bias):
    """Projections [..., p] to logits [..., K] by v [K, p], scale [K] and bias [K]."""
    return F.linear(z, v).mul_(scale).add_(bias)


class _CrossEntropy(torch.autograd.Function):
    """sum_t sum_r weight_tr H(target_tr, softmax(z_r W' + b)), and its parts, one for each t.

    W is kappa v / |v|, row by row.

    The plain way is

        log_probabilities = F.log_softmax(F.linear(z, W, bias), dim=1)
        parts = [-(t.weights * (t.probabilities(all) * log_probabilities).sum(1)).sum() for t in ..]

    It keeps several matrices [R, K]. Here the rows go through in parts. The gradient of the logits,
    softmax - target, is known at once, so those of z, v, kappa and b are added up and nothing is
    kept, not even W.
    """

    @staticmethod
    def forward(ctx, z, v, kappa, bias, targets):
        lengths = torch.linalg.vector_norm(v, dim=1)  # [K]
        scale = kappa / lengths
        grad_z, grad_v, grad_bias = (torch.zeros_like(each) for each in (z, v, bias))
        parts = z.new_zeros(len(targets))
        weighed = [bool(target.weights.any()) for target in targets]
        for rows in in_parts(z, len(v)):
            logits = logits_of(z[rows], v, scale, bias)  # [r, K]
            log_sum = logits.logsumexp(1)                # [r]
            grad = (logits - log_sum[:, None]).exp_()    # [r, K] softmax, then the gradient
            grad *= sum(target.weights[rows] for target in targets)[:, None]
            for number, target in enumerate(targets):
                if not weighed[number]:  # as in the first epoch
                    continue
                probabilities = target.probabilities(rows)
                entropies = log_sum - torch.linalg.vecdot(probabilities, logits)
                parts[number] += target.weights[rows] @ entropies
                grad -= probabilities * target.weights[rows, None]
            grad_bias += grad.sum(0)
            grad_v.addmm_(grad.T, z[rows])  # in place: a product of its own is large
            grad_z[rows] = grad.mul_(scale) @ v

        # From the gradient of W to those of its length and of v, which is across v
        grad_kappa = torch.linalg.vecdot(grad_v, v) / lengths
        grad_v.addcmul_(v, -(grad_kappa / lengths)[:, None]).mul_(scale[:, None])
        ctx.save_for_backward(grad_z, grad_v, grad_kappa, grad_bias)
        ctx.mark_non_differentiable(parts)
        return parts.sum(), parts

    @staticmethod
    def backward(ctx, grad, _):
        return *(each.mul_(grad) for each in ctx.saved_tensors), None


def prototype_loss(z, prototypes, temperature, targets):
    """The weighted sum of cross-entropies of a student's rows, and its parts.

    z: the student's projections [R, p]. prototypes: the student's. temperature: the student's.
    targets: a list of `Target`; each is a term of the loss.
    Returns: (a scalar, the terms [len(targets)] without gradient), as precise as the prototypes.
    """
    with in_float32(z):
        parts = prototypes.parts(temperature)
        return _CrossEntropy.apply(z.to(parts[0].dtype), *parts, targets)


def crop_partners(views, batch, device=None):
    """Which teacher's rows each student's row of a crop learns from (DINO, Eq. 3), and its weight.

    The first two of the views are global; the teacher sees these alone. A row of one global view
    has the other one as its partner, a row of a local view has both. The loss is the mean over
    pictures and over the pairs (teacher's view, student's other view).

    Returns: partners [views B, n] into the teacher's rows [2 B], both views by view; n is 1 without
    local views, else 2, where a global view's one partner stands twice; weights [views B].
    """
    image = torch.arange(batch, device=device)
    of_global = [image + batch, image]
    local = views - 2
    pairs = 2 + 2 * local
    if not local:
        partners = torch.cat(of_global)[:, None]  # [2 B, 1]
    else:
        twice = [rows[:, None].expand(-1, 2) for rows in of_global]
        both = torch.stack([image, image + batch], 1)  # [B, 2]
        partners = torch.cat([*twice, *[both] * local])
    counts = torch.ones(views, device=device)
    counts[2:] = 2
    return partners, counts.repeat_interleave(batch) / (pairs * batch)


def crop_loss(z, seen, layers, center, temperatures):
    """Cross-entropy of a crop's answer and the teacher's to the other global crops (DINO).

    z: the student's projections [V B, p], view by view. seen: the teacher's [2 B, p].
    layers, temperatures: prototypes and temperature of the student, then of the teacher.
    Returns: see `prototype_loss`; one term.
    """
    batch = len(seen) // 2
    partners, weights = crop_partners(len(z) // batch, batch, z.device)
    with torch.no_grad():
        target = Target(seen[partners], weights, layers[1], center, temperatures[1])
    return prototype_loss(z, layers[0], temperatures[0], [target])


def object_loss(z, seen, neighbors, mask, layers, center, temperatures):
    """The two losses of objects (CrIBo). Projections are [2, O, p], of O objects in both crops.

    Cross-view: the teacher's answer to the same object in the other crop. Cross-image: its answer
    to the stored object that is nearest to that one. A term is half the sum of both crops' means
    over the objects of all processes.

    z: the student's. seen: the teacher's. neighbors: the teacher's, of the nearest stored objects.
    mask: [2, O] those to learn from. Others: see `crop_loss`.
    Returns: see `prototype_loss`; two terms, 0 where there is nothing to learn from.
    """
    targets = []
    with torch.no_grad():
        for answers, chosen in ((seen, torch.ones_like(mask)), (neighbors, mask)):
            shares = [share(count, z.device) / max(1, 2 * count)
                      for count in chosen.sum(1).tolist()]
            weights = chosen * torch.stack(shares)[:, None]  # [2, O]
            # The student's objects of one crop learn from the teacher's of the other
            targets.append(Target(answers.flip(0).flatten(0, 1), weights.flip(0).flatten(),
                                  layers[1], center, temperatures[1]))
    return prototype_loss(z.flatten(0, 1), layers[0], temperatures[0], targets)


# ---- the teacher and the optimizer ---------------------------------------------------------------

@torch.no_grad()
def move_teacher(teacher, student, momentum):
    """The teacher's parameters become momentum x theirs + (1 - momentum) x the student's."""
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - momentum)


def parameter_groups(model, weight_decay):
    """Parameters for AdamW: those of two or more axes that are no bias decay, as in DINO's code.

    So the cls token, the positions and the lengths g of the prototypes decay too.
    """
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not name.endswith("bias")
            groups[0 if decays else 1]["params"].append(parameter)
    return groups


def set_rates(optimizer, lr, weight_decay):
    """Set the learning rate, and the decay of what decays, in `parameter_groups`."""
    optimizer.param_groups[0]["weight_decay"] = weight_decay
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_each(parameters, most):
    """Shorten each parameter's gradient that is longer than `most`: for itself, as DINO does."""
    for parameter in parameters:
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(parameter.grad)
            parameter.grad.mul_((most / (norm + 1e-6)).clamp(max=1))


def drop_gradients(model, part):
    """Forget the gradients of all parameters with `part` in their names: AdamW leaves them be."""
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.grad = None


# ---- what to look at -----------------------------------------------------------------------------

@torch.no_grad()
def health(z, prototypes, center, temperature):
    """Whether a teacher has collapsed, by its projections [R, p]: {name: number} for the log.

    The entropy of its mean answer is near 0 where it gives one prototype always; it is a part of
    log min(K, R), the most that R sure answers have, and 1 where it is more. That of its single
    answers is near 1, a part of log K, where it does not decide. Prototypes in use are the rows'
    likeliest ones; such as have a cosine of 0.9 with another count once.
    """
    target = Target(z, None, prototypes, center, temperature)
    mean = torch.zeros_like(center.value)
    entropy = 0.0
    used = []
    for rows in in_parts(z, len(mean)):
        probabilities = target.probabilities(rows)
        mean += probabilities.sum(0) / len(z)
        entropy += torch.special.entr(probabilities).sum().item() / len(z)
        used.append(probabilities.argmax(1))
    used = torch.cat(used).unique()
    directions = F.normalize(prototypes.weight_v[used], dim=1)
    again = (directions @ directions.T).tril(-1) >= 0.9
    most = math.log(min(len(mean), max(2, len(z))))
    return {"entropy_of_mean": min(1.0, torch.special.entr(mean).sum().item() / most),
            "mean_entropy": entropy / math.log(len(mean)),
            "prototypes_used": len(used) - int(again.any(1).sum()),
            "prototype_norms": prototypes.norms()}
