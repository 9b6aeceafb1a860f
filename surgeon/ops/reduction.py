"""Reductions and normalisations: a dim of one operand ends, or its entries are normalised by each other.

Ids pass along the dims that stay. `renormalises` says which ops compute something else when fewer entries are
there (a mean, a softmax, a layer norm): the proof computes those over the entries that stay.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from surgeon.graph.queries import is_read
from surgeon.ops.elementwise import per_channel
from surgeon.ops.ids import ValueIds
from surgeon.ops.reshape import reshape
from surgeon.ops.table import Family, Site, broadcast, op_name, rule


def reduce_dims(site: Site, axes: ValueIds, dims: Any, ndim: int, keepdim: bool) -> ValueIds:
    """Tracks after the dims ended; a track that varied along one of them is made constant there."""
    gone = {int(d) % ndim for d in dims} if ndim else set()
    for d in gone & set(axes):
        site.constraints.reduced(axes[d])
    result: ValueIds = {}
    for dim, track in axes.items():
        if dim in gone:
            continue
        for ended in gone:
            track = site.constraints.collapse(track, ended)
        if not keepdim:
            track = track.reshape([n for d, n in enumerate(track.shape) if d not in gone])
        result[dim if keepdim else dim - sum(g < dim for g in gone)] = track
    return result


@rule(
    Family.REDUCTION, "mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm",
    "logsumexp", "any", "all", "prod", "nansum",
)  # fmt: skip
def reduction(site: Site) -> Any:
    x = site.args[0]
    ndim = len(site.shape(x))
    names = [a.name for a in site.schema.arguments]
    bound = {**dict(zip(names, site.args, strict=False)), **site.node.kwargs}
    dims = bound.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        dims = range(ndim)
    axes = reduce_dims(site, site.axes(x), dims, ndim, bool(bound.get("keepdim", False)))
    spec = site.node.meta["spec"]
    return tuple(axes for _ in spec) if isinstance(spec, tuple) else axes


@rule(Family.REDUCTION, "max", "min", "argmax", "argmin", "median", "kthvalue", "mode")
def selection(site: Site) -> Any:
    """Pick one entry along a dim and tell its index: if that is read, the dim may not lose entries.

    The greatest of all is a number.
    """
    x, ndim = site.args[0], len(site.shape(site.args[0]))
    second = site.arg(1, "dim")
    spec = site.node.meta["spec"]
    if isinstance(second, fx.Node):  # max.other
        operands = [(site.axes(a), site.shape(a)) for a in (x, second)]
        return broadcast(site, operands, site.out)
    if second is None and op_name(site.node) in ("max", "min"):
        return {}
    if second is None:
        site.constraints.freeze_all(site.axes(x), "an index is computed over it")
        return tuple({} for _ in spec) if isinstance(spec, tuple) else {}
    axes = site.axes(x)
    if op_name(site.node) not in ("max", "min") or is_read(site.node, 1):
        axes = site.freeze(axes, [second % ndim], "an index is computed over it")
    axes = reduce_dims(site, axes, [second], ndim, bool(site.arg(2, "keepdim", False)))
    return tuple(axes for _ in spec) if isinstance(spec, tuple) else axes


@rule(Family.REDUCTION, "_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def softmax(site: Site) -> ValueIds:
    x = site.args[0]
    dim = int(site.arg(1)) % max(1, len(site.out))
    axes = dict(site.axes(x))
    if dim in axes:
        site.constraints.reduced(axes[dim])
    return {d: (t if d == dim else site.constraints.collapse(t, dim)) for d, t in axes.items()}


@rule(Family.REDUCTION, "cumsum", "cumprod", "cummax", "logcumsumexp", "sort", "topk", "flip_sort")
def ordered(site: Site) -> Any:
    """Entries along the dim depend on their order: that dim stays whole."""
    x, ndim = site.args[0], len(site.shape(site.args[0]))
    name = op_name(site.node)
    dim = site.arg(2, "dim", -1) if name == "topk" else site.arg(1, "dim", -1)
    axes = site.freeze(site.axes(x), [int(dim) % max(ndim, 1)], f"{name} runs along it")
    spec = site.node.meta["spec"]
    return tuple(axes for _ in spec) if isinstance(spec, tuple) else axes


@rule(Family.REDUCTION, "_fft_r2c", "_fft_c2c", "_fft_c2r")
def fourier(site: Site) -> ValueIds:
    """Each result hangs on every entry along the dims and on its place: they stay whole."""
    x, ndim = site.args[0], len(site.out)
    dims = [int(d) % ndim for d in site.arg(1)]
    axes = site.freeze(site.axes(x), dims, "a Fourier transform runs along it")
    for dim in dims:
        axes = {d: site.constraints.collapse(t, dim) for d, t in axes.items()}
    return axes


@rule(Family.REDUCTION, "native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(site: Site) -> Any:
    """x [..., normalized_shape] normalised over the last dims, scaled by weight and bias of that shape."""
    x, shape = site.args[:2]
    last = len(shape)
    operands = [(site.axes(x), site.shape(x))]
    operands += [(site.axes(v), site.shape(v)) for v in site.args[2:4] if isinstance(v, fx.Node)]
    out = broadcast(site, operands, site.out)
    ndim = len(site.out)
    gone = range(ndim - last, ndim)
    for d in set(gone) & set(site.axes(x)):  # x itself: the scale that it meets comes after
        site.constraints.reduced(site.axes(x)[d])
    passing = {d: t for d, t in out.items() if d < ndim - last}
    stats = reduce_dims(site, passing, gone, ndim, keepdim=True)
    spec = site.node.meta["spec"]
    return tuple(out if i == 0 else stats for i, _ in enumerate(spec)) if isinstance(spec, tuple) else out


@rule(Family.REDUCTION, "native_group_norm", "group_norm")
def group_norm(site: Site) -> Any:
    """x [N, C, ...] normalised over each of g groups of C/g channels: groups are rows, every row keeps
    equally many.
    """
    x, weight, bias = site.args[:3]
    groups = int(site.arg(6))
    shape = site.shape(x)
    axes = site.freeze(site.axes(x), range(2, len(shape)), "is a spatial dim of a group norm")
    grid = (shape[0], groups, shape[1] // groups, *shape[2:])
    cut = reshape(site.constraints, axes, shape, grid)
    for d in {1, 2} & set(cut):
        site.constraints.reduced(cut[d])
    axes = reshape(site.constraints, cut, grid, shape)
    if 1 in cut:
        site.constraints.batched.append(cut[1].ravel())
    operands = [(axes, shape)]
    for vector in (weight, bias):
        if isinstance(vector, fx.Node):
            wide, track = per_channel(site.shape(vector), site.axes(vector), len(shape))
            operands.append((track, wide))
    out = broadcast(site, operands, shape)
    return tuple(out if i == 0 else {} for i, _ in enumerate(site.node.meta["spec"]))


@rule(Family.REDUCTION, "_weight_norm_interface")
def weight_norm(site: Site) -> Any:
    """v * g / |v|, the norm over all dims but one: g is [O, 1, ...] along that dim."""
    v, g = site.args[:2]
    out = broadcast(site, [(site.axes(v), site.shape(v)), (site.axes(g), site.shape(g))], site.out)
    return out, {d: t for d, t in out.items() if d == int(site.arg(2, "dim", 0))}


_POOLS = {
    "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "max_pool1d": 1, "max_pool2d": 2, "avg_pool1d": 1,
    "avg_pool2d": 2, "avg_pool3d": 3, "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3, "adaptive_avg_pool1d": 1,
    "adaptive_avg_pool2d": 2, "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3, "upsample_nearest1d": 1,
    "upsample_nearest2d": 2, "upsample_nearest3d": 3, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_linear1d": 1,
    "upsample_trilinear3d": 3, "_upsample_nearest_exact2d": 2, "_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2,
    "reflection_pad1d": 1, "reflection_pad2d": 2, "replication_pad1d": 1, "replication_pad2d": 2, "replication_pad3d": 3,
    "mkldnn_max_pool2d": 2,
}  # fmt: skip


@rule(Family.REDUCTION, *_POOLS)
def pooling(site: Site) -> Any:
    """Windows over the last spatial dims; batch and channels pass."""
    name = op_name(site.node)
    x, ndim = site.args[0], len(site.shape(site.args[0]))
    spatial = range(ndim - _POOLS[name], ndim)
    axes = site.freeze(site.axes(x), spatial, f"is a spatial dim of {name}")
    for dim in spatial:
        axes = {d: site.constraints.collapse(t, dim) for d, t in axes.items()}
    spec = site.node.meta["spec"]
    return tuple(axes for _ in spec) if isinstance(spec, tuple) else axes


@rule(Family.REDUCTION, "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(site: Site) -> Any:
    """x is [N, C, spatial], the grid [N, spatial, 2 or 3]: each sample reads its own places; channels
    pass.
    """
    x, grid = site.args[:2]
    places = "is a place or a coordinate of grid_sample"
    axes = site.freeze(site.axes(x), range(2, len(site.shape(x))), "is a spatial dim of grid_sample")
    for dim in range(2, len(site.shape(x))):
        axes = {d: site.constraints.collapse(t, dim) for d, t in axes.items()}
    own = site.freeze(site.axes(grid), range(1, len(site.shape(grid))), places)
    one = (1,) * (len(site.out) - 1)
    samples = broadcast(
        site,
        [({d: t for d, t in a.items() if d == 0}, (site.out[0], *one)) for a in (axes, own)],
        (site.out[0], *one),
    )
    return {d: t for d, t in axes.items() if d != 0} | samples
