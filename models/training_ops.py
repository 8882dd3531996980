"""The operations of `training_form.py`, each with a backward pass of its own.

A training step is bound by memory traffic: BatchNorm, GELU and the sums of the branches move more bytes than the matrix
products do. These operations compute what the layers compute, with fewer passes over the maps:

- Statistics. A BatchNorm over S share-sets has few channels, each of which a GPU would sum on one multiprocessor. Here
  sums are taken for every row, one channel of one image, and added up afterwards.
- The first FFN layer. Its BatchNorm needs no pass over the hidden maps, which are four times as wide as all others. The
  layer is linear, h = W y, so that the variance of h_o is w_o^T Cov(y) w_o, and Cov comes from one product X X^T. The
  BatchNorm before it folds in likewise. What is left is an affine map of X, which has a row of ones below its channels
  (homogeneous coordinates): one product with (W, b) computes it, and one gives the gradients of both.
- Sums. The BatchNorms of FC3 and of the convolutions, gate, drop path and shortcut are one function. The 1x1 branch
  multiplies each share-set by a number, so that it is no map of its own but a factor of the shortcut.

An operation whose input is read again later returns it first, for the later ones to read. Its backward pass then
receives their gradient and adds its own, where autograd would add the two in a pass of its own.

Shapes: N images (or partitions), C channels in groups of S share-sets (channel c belongs to set c mod S), K = h * w
positions. X is (C + EXTRA_ROWS, N * K). Sums and coefficients are float32 at least, whatever the maps are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# Rows of X below the channels: one of ones, the others of zeros, since matrix units take multiples of eight.
EXTRA_ROWS = 8
PIECE = 1024  # columns of X that a CPU converts to float32 at a time, few enough for its cache


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums over maps of a dtype."""
    return torch.promote_types(dtype, torch.float32)


def homogeneous(weight: Tensor, bias: Tensor) -> Tensor:
    """Returns the matrix (O, C + EXTRA_ROWS) that maps X to weight * x + bias; weight is (O, C), bias (O,)."""
    return F.pad(torch.cat((weight, bias.unsqueeze(1)), 1), (0, EXTRA_ROWS - 1))


def normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """BatchNorm over images and positions.

    Args:
        x: (N, C, K), contiguous.
        weight: (C,).
        bias: (C,).
        eps: added to the variance.

    Returns:
        x; the normalised map; the means of x over positions (N, C); mean and biased variance of x (C,).
    """
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _Normalize.apply(x, weight, bias, eps)
    return out


def convolve(y: Tensor, fc: Tensor, kernels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """FC3 and depth-wise convolutions of one map.

    Args:
        y: (N, C, h, w), contiguous.
        fc: the kernel (S, K, K) of FC3.
        kernels: of the convolutions, (C, 1, k, k).

    Returns:
        The map of each, (N, C, K).
    """
    out: tuple[Tensor, ...] = _Convolve.apply(y, fc, *kernels)
    return out


def combine(
    x: Tensor,
    factor: Tensor,
    offset: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    maps: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """factor * x + offset + gate * the sum of B maps, each after a BatchNorm over share-sets.

    Args:
        x: (N, C, K), contiguous.
        factor: (N, C).
        offset: (N, C).
        gate: (N, C).
        weight: (B, S).
        bias: (B, S).
        eps: added to the variances.
        maps: (N, C, K) each, contiguous.

    Returns:
        X; mean and biased variance of the maps (B, S), which are not differentiable.
    """
    out: tuple[Tensor, Tensor, Tensor] = _Combine.apply(x, factor, offset, gate, weight, bias, eps, *maps)
    return out


def center(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Subtracts the mean of positions, rounded to their precision, and computes their covariance.

    Without it, a channel far from 0 would lose the digits of its deviation in the products that follow.

    Args:
        x: X, changed in place.
        bias: (C,), of a BatchNorm of X behind which another one follows a linear map, which removes it again: its
            gradient is 0.

    Returns:
        X less c; its mean (C,), what is left of it by rounding; its covariance (C, C); c (C,), a constant.
    """
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _Center.apply(x, bias)
    return out


def feed_forward(
    x: Tensor,
    center: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """x + c + gate * BN(second * gelu(first * X)), the FFN beside its shortcut.

    Args:
        x: X less c, as `center` returns it.
        center: c (C,), a constant.
        first: (4C, C + EXTRA_ROWS).
        second: (C, 4C).
        weight: (C,).
        bias: (C,).
        eps: added to the variance.
        gate: (N, 1).

    Returns:
        A map (N, C, K); mean and biased variance (C,) before the BatchNorm, which are not differentiable.
    """
    out: tuple[Tensor, Tensor, Tensor] = _FeedForward.apply(x, center, first, second, weight, bias, eps, gate)
    return out


class _Normalize(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        n = x.shape[0]
        rows, variances = _row_moments(x)
        mean, var = _joint_moments(rows, variances, 0)
        invstd, scale, shift = _scale_and_shift(mean, var, weight, bias, eps)
        y = _affine(x, scale.expand(n, -1), shift.expand(n, -1))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, invstd, scale)
        return x, y, rows, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, dy, d_rows, d_mean, d_var = grads
        x, mean, invstd, scale = ctx.saved_tensors
        n, _, k = x.shape
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        sums, products = _row_sums(dy, x)
        d_bias = sums.sum(0)
        d_weight, factor, offset = _norm_gradients(products.sum(0), d_bias, mean, invstd, scale, n * k)
        if d_var is not None:
            on_var = d_var * (2 / (n * k))
            factor, offset = factor + on_var, torch.addcmul(offset, on_var, mean, value=-1)
        if d_mean is not None:
            offset = offset + d_mean / (n * k)
        offset = offset.expand(n, -1) if d_rows is None else offset + d_rows / k
        out = _behind_norm(x, dy, scale.expand(n, -1), factor.expand(n, -1), offset)
        return out if dx is None else out.add_(dx), d_weight, d_bias, None


class _Convolve(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, fc: Tensor, *kernels: Tensor) -> tuple[Tensor, ...]:
        n, c = y.shape[:2]
        ctx.save_for_backward(y, fc, *kernels)
        out = y.new_empty(n, c, fc.shape[1])
        _write(_sets(out, len(fc)), torch.bmm, _sets(y, len(fc)), fc.transpose(1, 2))
        convolved = (F.conv2d(y, kernel, padding=kernel.shape[2] // 2, groups=c) for kernel in kernels)
        return out, *(m.reshape(n, c, -1) for m in convolved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        y, fc, *kernels = ctx.saved_tensors
        rows = _sets(grads[0].contiguous(), len(fc))
        dy, d_kernels = None, []
        for kernel, grad in zip(kernels, grads[1:], strict=True):
            padding = [kernel.shape[2] // 2] * 2
            geometry = [1, 1], padding, [1, 1], False, [0, 0], y.shape[1], [True, True, False]
            gradients = torch.ops.aten.convolution_backward(grad.reshape(y.shape), y, kernel, None, *geometry)
            dy = gradients[0].contiguous() if dy is None else dy.add_(gradients[0])
            d_kernels.append(gradients[1])
        if dy is None:
            dy = torch.empty_like(y)
            _write(_sets(dy, len(fc)), torch.bmm, rows, fc)
        elif torch.compiler.is_compiling():  # which loses the strides of a product in place
            dy = dy + torch.bmm(rows, fc).transpose(0, 1).reshape(y.shape)
        else:
            _sets(dy, len(fc)).baddbmm_(rows, fc)
        return dy, torch.bmm(rows.transpose(1, 2), _sets(y, len(fc))), *d_kernels


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        x, factor, offset, gate, weight, bias, eps, *maps = inputs
        (n, c, k), sets = x.shape, weight.shape[1]
        means, variances = (
            torch.stack(rows).view(len(maps), -1, sets) for rows in zip(*map(_row_moments, maps), strict=True)
        )
        mean, var = _joint_moments(means, variances, 1)
        invstd, scale, shifts = _scale_and_shift(mean, var, weight, bias, eps)
        shift = shifts.sum(0).repeat(c // sets)
        scales = scale.repeat(1, c // sets)
        on_maps = scales.unsqueeze(1) * gate
        total = _affine(x, factor, torch.addcmul(offset, gate, shift))
        for m, on_map in zip(maps[:-1], on_maps[:-1], strict=True):
            _add_scaled_(total, m, on_map)
        out = x.new_empty(c + EXTRA_ROWS, n * k)
        out[c:].zero_()
        out[c].fill_(1)
        columns = out[:c].view(c, n, k).transpose(0, 1)
        _write(columns, torch.addcmul, total, maps[-1], _row_factors(on_maps[-1], total))
        ctx.save_for_backward(x, factor, gate, shift, scales, on_maps, mean, invstd, scale, *maps)
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, gate, shift, scales, on_maps, mean, invstd, scale, *maps = ctx.saved_tensors
        (n, c, k), sets = x.shape, scale.shape[1]
        d = grads[0][:c].view(c, n, k).transpose(0, 1).clone(memory_format=torch.contiguous_format)
        d_offset, d_factor, *products = _row_sums(d, x, *maps)
        d_gate = d_offset * shift
        for scale_of_map, product in zip(scales, products, strict=True):
            d_gate.addcmul_(product, scale_of_map)
        gated = (torch.stack([d_offset, *products]) * gate).view(1 + len(maps), -1, sets).sum(1)
        d_bias = gated[:1].repeat(len(maps), 1)  # a tensor for each, since gradients are added up in place
        d_weight, *statistics = _norm_gradients(gated[1:], d_bias, mean, invstd, scale, x.numel() // sets)
        of_rows = (t.repeat(1, c // sets).unsqueeze(1).expand(-1, n, -1) for t in statistics)
        d_maps = [_behind_norm(m, d, *t) for m, *t in zip(maps, on_maps, *of_rows, strict=True)]
        return d.mul_(_row_factors(factor, d)), d_factor, d_offset, d_gate, d_weight, d_bias, None, *d_maps


class _Center(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        c, count = x.shape[0] - EXTRA_ROWS, x.shape[1]
        center = x[:c].mean(1, dtype=wide(x.dtype)).to(x.dtype)
        x[:c].sub_(center.unsqueeze(1))
        product = _wide_product(x) / count
        mean = product[:c, c]  # by the row of ones
        covariance = torch.addr(product[:c, :c], mean, mean, alpha=-1)
        ctx.mark_dirty(x)
        ctx.mark_non_differentiable(center)
        ctx.save_for_backward(x, mean)
        return x, mean, covariance, center

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (dx, d_mean, d_covariance, _), (x, mean) = grads, ctx.saved_tensors
        factor = (d_covariance + d_covariance.t()) / x.shape[1]
        offset = torch.addmv(d_mean / x.shape[1], factor, mean, alpha=-1)
        matrix = F.pad(homogeneous(factor, offset), (0, 0, 0, EXTRA_ROWS))
        if x.dtype != torch.float16:
            return torch.addmm(dx, matrix.to(x.dtype), x), torch.zeros_like(mean)
        # The factor of a channel of small deviation may be too large for float16, though its product is not.
        root = matrix.abs().amax().sqrt().clamp_min(1)
        product = torch.mm((matrix / root.square()).to(x.dtype), x)
        return product.mul_(root.to(x.dtype)).mul_(root.to(x.dtype)).add_(dx), torch.zeros_like(mean)


class _FeedForward(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        x, center, first, second, weight, bias, eps, gate = inputs
        n, c, count = gate.shape[0], second.shape[0], x.shape[1]
        hidden = torch.mm(first, x)
        z = torch.mm(second, F.gelu(hidden)).view(c, n, -1)
        mean, var = _joint_moments(*_row_moments(z), 1)
        invstd, scale, shift = _scale_and_shift(mean, var, weight, bias, eps)
        branch = _affine(z, scale.unsqueeze(1) * gate.t(), center.unsqueeze(1) + shift.unsqueeze(1) * gate.t())
        out = x.new_empty(n, c, count // n)
        _write(out.transpose(0, 1), torch.add, branch, x[:c].view(z.shape))
        ctx.save_for_backward(x, first, second, hidden, z, mean, invstd, scale, gate)
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second, hidden, z, mean, invstd, scale, gate = ctx.saved_tensors
        (c, n, k), count = z.shape, x.shape[1]
        dx = torch.empty_like(x)
        dx[c:].zero_()
        d = dx[:c].view(c, n, k)
        d.copy_(grads[0].transpose(0, 1))
        d_bias, products = ((rows * gate.t()).sum(1) for rows in _row_sums(d, z))
        d_weight, *statistics = _norm_gradients(products, d_bias, mean, invstd, scale, count)
        of_rows = (t.unsqueeze(1).expand(-1, n) for t in statistics)
        dz = _behind_norm(z, d, scale.unsqueeze(1) * gate.t(), *of_rows).view(c, count)
        d_second = torch.mm(dz, F.gelu(hidden).t())  # rather than kept: a quarter of all memory
        d_hidden = torch.ops.aten.gelu_backward(torch.mm(second.t(), dz), hidden)
        d_first = torch.mm(d_hidden, x.t())
        return dx.addmm_(first.t(), d_hidden), None, d_first, d_second, d_weight, d_bias, None, None


def _wide_product(x: Tensor) -> Tensor:
    """Returns x x^T in float32 at least, in which products of half precision are exact; without a copy of x."""
    if x.dtype == wide(x.dtype):
        return x @ x.t()
    if x.device.type != "cpu":
        return torch.mm(x, x.t(), out_dtype=torch.float32)
    if torch.compiler.is_compiling():
        return x.float() @ x.float().t()
    product = torch.zeros(len(x), len(x), device=x.device)
    for piece in x.split(PIECE, 1):
        columns = piece.float()
        product.addmm_(columns, columns.t())
    return product


def _scale_and_shift(
    mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns 1 / deviation, and scale and shift of a BatchNorm, all in the shape of its mean."""
    invstd = (var + eps).rsqrt()
    scale = weight * invstd
    return invstd, scale, torch.addcmul(bias, mean, scale, value=-1)


def _norm_gradients(
    products: Tensor, d_bias: Tensor, mean: Tensor, invstd: Tensor, scale: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradient of a BatchNorm's weight, and those that reach its input m through the statistics.

    Args:
        products: the sum of the gradient of its output times m, for every channel.
        d_bias: the sum of that gradient.
        mean: of m.
        invstd: 1 / deviation of m.
        scale: weight * invstd.
        count: values of a channel.

    Returns:
        The gradient of the weight; a and b of the term a * m + b of the gradient of m.
    """
    d_weight = invstd * torch.addcmul(products, mean, d_bias, value=-1)
    factor = scale * invstd * d_weight / -count
    return d_weight, factor, torch.addcmul(scale * d_bias / -count, factor, mean, value=-1)


def _is_eager_on_cpu(x: Tensor) -> bool:
    """Returns whether operators that are made for other purposes are the fastest: a compiler makes its own."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _row_sums(d: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
    """Returns the sums of d, and of d times each of the maps, over the last dimension: (A, B, K) -> (A, B)."""
    dtype = wide(d.dtype)
    if torch.compiler.is_compiling() or (d.dtype == torch.float16 and not _is_eager_on_cpu(d)):
        d = d.to(dtype)  # sums of gradients that are scaled for float16 may be too large for it
        return d.sum(2), *((d * m).sum(2) for m in maps)
    both = [_two_row_sums(d, m) for m in maps]
    return both[0][0], *(products for _, products in both)


def _row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and variance over the last dimension: (A, B, K) -> (A, B)."""
    k, dtype = x.shape[2], wide(x.dtype)
    if x.dtype != dtype:  # in which the squares lose nothing that half precision has
        if _is_eager_on_cpu(x):
            sums, squares = _two_row_sums(x, x)
        else:
            sums, squares = x.sum(2, dtype=dtype), torch.linalg.vector_norm(x, dim=2, dtype=dtype).square()
        mean = sums / k
        return mean, torch.addcmul(squares / k, mean, mean, value=-1).clamp_min_(0)
    mean = x.mean(2)
    centred = x - mean.unsqueeze(2)
    squares = _two_row_sums(centred, centred)[1] if _is_eager_on_cpu(x) else centred.square().sum(2)
    return mean, squares / k


def _joint_moments(means: Tensor, variances: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Returns mean and variance of all values of rows of equal length, from those of each; `dim` counts the rows."""
    between, mean = torch.var_mean(means, dim, correction=0)
    return mean, variances.mean(dim) + between


def _two_row_sums(d: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums of d and of d * x over the last dimension: (A, B, K) -> (A, B), in one pass.

    They are the gradients of shift and scale after a normalisation with mean 0 and deviation 1. A GPU rounds them to
    the precision of the maps.
    """
    a, b, k = d.shape
    ones = torch.ones(a * b, dtype=wide(d.dtype) if _is_eager_on_cpu(d) else d.dtype, device=d.device)
    one = ones[:1].view(1, 1)
    maps, wanted = (t.reshape(1, a * b, k) for t in (d, x)), [False, True, True]
    _, products, sums = torch.ops.aten.native_group_norm_backward(
        *maps, torch.zeros_like(one), one, ones, 1, a * b, k, 1, wanted
    )
    return sums.view(a, b).to(wide(d.dtype)), products.view(a, b).to(wide(d.dtype))


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Returns scale * x + shift for every row, rounded once: x (A, B, K), scale and shift (A, B)."""
    if not _is_eager_on_cpu(x):
        return _write(torch.empty_like(x), torch.addcmul, shift.unsqueeze(2), x, scale.unsqueeze(2))
    # Operators on two dtypes would convert whole maps first; BatchNorm does not.
    a, b, k = x.shape
    scale, shift = scale.reshape(-1), shift.reshape(-1)
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    out = F.batch_norm(x.reshape(1, a * b, k), zeros, ones, scale, shift, False, 0.0, 0.0)
    return out.view(a, b, k)


def _behind_norm(m: Tensor, d: Tensor, scale: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """Returns scale * d + factor * m + offset for every row, the gradient of a map m from that behind its BatchNorm.

    The last two terms are those of the statistics: corrections that need no more than the precision of the map.
    """
    if _is_eager_on_cpu(m):
        return _add_scaled_(_affine(m, factor, offset), d, scale)
    factor, offset = (t.to(m.dtype).unsqueeze(2) for t in (factor, offset))
    return _add_scaled_(torch.addcmul(offset, m, factor), d, scale)


def _add_scaled_(out: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Adds scale * x to `out`, in place, for every row: (A, B, K) and scale (A, B)."""
    return out.addcmul_(x, _row_factors(scale, x))


def _row_factors(scale: Tensor, x: Tensor) -> Tensor:
    """Returns factors (A, B) of the rows of x in the shape and dtype for a product with it."""
    return (scale.to(x.dtype) if _is_eager_on_cpu(x) else scale).unsqueeze(2)


def _write(out: Tensor, operator: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Writes what an operator returns into `out`, a view of any strides, rounded to its dtype."""
    if torch.compiler.is_compiling():  # which has no use for the argument `out`
        return out.copy_(operator(*inputs))
    return operator(*inputs, out=out)


def _sets(x: Tensor, share_sets: int) -> Tensor:
    """Returns the view (S, N * C / S, K) of a contiguous map (N, C, ...)."""
    return x.view(-1, share_sets, x[0, 0].numel()).transpose(0, 1)
