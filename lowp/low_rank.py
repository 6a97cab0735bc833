"""Linear layers as products of two thin factors: the other way to shrink a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowp.convert import HEADS, shared_parameters
from lowp.linear import Linear
from lowp.recipe import Recipe, recipe_of

Filter = Callable[[nn.Module, str], bool]


class LowRankLinear(nn.Module):
    """``y = act(left(right(x)))``: a linear layer whose weight [N, K] is left [N, r] right [r, K].

    Both factors are :class:`lowp.Linear`, so all products of both run by the recipe, and
    :func:`lowp.convert` replaces it. Freshly made, ``right`` is drawn as ``nn.Linear`` is and
    ``left`` with variance 1/r, so their product has the variance of an ``nn.Linear`` weight.

    Args:
        in_features, out_features: K and N.
        rank: r, from 1 to min(K, N).
        bias, device, dtype, precision, activation: as in :class:`lowp.Linear`.
        name: the layer's qualified name, which keys the random bits of the factors.

    Raises:
        ValueError: a rank out of range.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True,
                 device: Any = None, dtype: torch.dtype | None = None, *,
                 precision: str | int | Recipe = "fp32", activation: str = "none",
                 name: str | None = None) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"lowp.LowRankLinear: rank must be from 1 to "
                             f"{min(in_features, out_features)}, got {rank}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.merges_into = "Linear"
        names = [None if name is None else f"{name}.{part}" for part in ("right", "left")]
        self.right = Linear(in_features, rank, False, device, dtype, precision=precision,
                            name=names[0])
        self.left = Linear(rank, out_features, bias, device, dtype, precision=precision,
                           activation=activation, name=names[1])
        nn.init.uniform_(self.left.weight, -math.sqrt(3 / rank), math.sqrt(3 / rank))
        if self.left.bias is not None:
            bound = 1 / math.sqrt(in_features)
            nn.init.uniform_(self.left.bias, -bound, bound)

    @property
    def weight(self) -> Tensor:
        """left right, [N, K], summed in fp32 and rounded once to the factors' type."""
        product = self.left.weight.float() @ self.right.weight.float()
        return product.to(self.left.weight.dtype)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias [N], which is the left factor's."""
        return self.left.bias

    @property
    def recipe(self) -> Recipe:
        """The recipe of the left factor."""
        return _recipe(self.left)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        y: Tensor = self.left(self.right(input))
        return y

    def extra_repr(self) -> str:
        """Sizes and rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class FactorEntry(NamedTuple):
    """What :func:`factorize` did with one linear layer.

    Attributes:
        error: ‖W − left right‖ / ‖W‖ (Frobenius) of the factors as they are stored; 0 if kept.
        parameters_before, parameters_after: of its weight.
    """

    fqn: str
    factorized: bool
    reason: str
    shape: tuple[int, int]
    rank: int
    error: float
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        verdict = f"rank {self.rank}, error {self.error:.4f}" if self.factorized else "keep"
        return (f"{verdict:26}{self.fqn or '(root)'}  {list(self.shape)}  "
                f"{self.parameters_before} -> {self.parameters_after}  {self.reason}")


class Factorization(NamedTuple):
    """What :func:`factorize` returns; prints as a table.

    Attributes:
        model: the same object, except that a root that is a linear layer itself is replaced.
        layers: one entry for each linear layer.
    """

    model: nn.Module
    layers: list[FactorEntry]

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers)) or "no linear layer found"


def svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [N, m], S [m], Vᵀ [m, K] of [N, K] in fp64, m = min(N, K), with the signs fixed.

    Singular vectors come in pairs of either sign; the entry of each column of U that is largest in
    magnitude (the first of equals) is made positive, so equal weights have equal factors.
    """
    u, s, vt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    largest = u.abs().argmax(0, keepdim=True)
    signs = torch.where(u.gather(0, largest) < 0, -1.0, 1.0)  # [1, m]
    return u * signs, s, vt * signs.t()


def rank_for(s: Tensor, energy: float) -> int:
    """The smallest rank that keeps ``energy`` of the sum of squares of the singular values."""
    kept = s.square().cumsum(0)
    if not len(s) or kept[-1] == 0:
        return 1
    return int(torch.searchsorted(kept, energy * kept[-1]).item()) + 1


def _layers(model: nn.Module, filter_fn: Filter | None) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, module and, where it must stay as it is, the reason."""
    tied = shared_parameters(model)
    for fqn, module in model.named_modules():
        conv1d = any(k.__name__ == "Conv1D" and k.__module__ == "transformers.pytorch_utils"
                     for k in type(module).__mro__)
        if not isinstance(module, nn.Linear) and not conv1d:
            continue
        reason = ""
        if not conv1d and type(module) not in (nn.Linear, Linear):
            reason = f"a subclass of nn.Linear: {type(module).__name__}"
        elif filter_fn is not None:
            reason = "" if filter_fn(module, fqn) else "filter_fn said no"
        elif fqn.rpartition(".")[2] in HEADS:
            reason = "the language model head: its errors reach the loss directly"
        elif id(module.weight) in tied:
            reason = "its weight is tied to another module's"
        yield fqn, module, reason


def _recipe(module: nn.Module) -> Recipe:
    """A layer's recipe; fp32 for one that is not lowp's."""
    recipe = getattr(module, "recipe", None)
    return recipe if isinstance(recipe, Recipe) else recipe_of("fp32")


def _replacement(module: Any, fqn: str, u: Tensor, s: Tensor, vt: Tensor, rank: int,
                 recipe: Recipe) -> LowRankLinear:
    weight = module.weight
    layer = LowRankLinear(vt.shape[1], u.shape[0], rank, module.bias is not None,
                          weight.device, weight.dtype, precision=recipe, name=fqn,
                          activation=getattr(module, "activation", "none"))
    root = s[:rank].sqrt()
    with torch.no_grad():
        layer.left.weight.copy_(u[:, :rank] * root)
        layer.right.weight.copy_(root[:, None] * vt[:rank])
    if module.bias is not None:
        layer.left.bias = module.bias
    for factor in (layer.left, layer.right):
        factor.weight.requires_grad_(weight.requires_grad)
    layer.merges_into = "Linear" if isinstance(module, nn.Linear) else "Conv1D"
    return layer.train(module.training)


def _put(model: nn.Module, fqn: str, module: nn.Module) -> nn.Module:
    """Replace the module of that name; the model, which is the module itself for the root."""
    if not fqn:
        return module
    parent, _, name = fqn.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model


def factorize(model: nn.Module, *, rank: int | None = None, energy: float | None = None,
              filter_fn: Filter | None = None,
              precision: str | int | Recipe | None = None) -> Factorization:
    """Make the linear layers of ``model`` :class:`LowRankLinear`, from their truncated SVD.

    W ≈ (U_r √S_r) (√S_r V_rᵀ), the best approximation of its rank, with error ‖S_{>r}‖ (Eckart and
    Young, Psychometrika 1936). A layer that would not have fewer parameters so is kept. Factors are
    new parameters: make the optimizer afterwards. Hooks on a replaced layer are gone.

    Args:
        model: any module; changed in place.
        rank: r of every layer; or
        energy: the part of ‖W‖² to keep, in (0, 1], from which each layer's rank follows.
        filter_fn: ``(module, fqn) -> bool``, which to factorize. By default language model heads
            and tied weights are left alone; a filter replaces that rule.
        precision: of the factors; by default that of the layer, fp32 for ``nn.Linear``.

    Returns:
        The model, and of each linear layer its rank and error.

    Raises:
        ValueError: not one of rank and energy, or one out of range; a weight that is not finite or
            has no data. Nothing is changed then.
    """
    if (rank is None) == (energy is None):
        raise ValueError("lowp.factorize: expected rank or energy, got "
                         + ("neither" if rank is None else "both"))
    if rank is not None and rank < 1:
        raise ValueError(f"lowp.factorize: rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"lowp.factorize: energy must be in (0, 1], got {energy}")
    chosen = None if precision is None else recipe_of(precision)
    entries: list[FactorEntry] = []
    fresh: dict[str, LowRankLinear] = {}
    for fqn, module, reason in _layers(model, filter_fn):
        held: Any = module.weight
        weight = held if isinstance(module, nn.Linear) else held.t()
        count, shape = weight.numel(), (weight.shape[0], weight.shape[1])
        if not reason:
            if weight.is_meta or not bool(weight.isfinite().all()):
                raise ValueError(f"lowp.factorize: layer {fqn!r} must have a finite weight, got "
                                 + ("one without data" if weight.is_meta else "NaN or Inf"))
            u, s, vt = svd(weight)
            r = rank if energy is None else rank_for(s, energy)
            assert r is not None
            smaller = r * sum(shape)
            if smaller < count:
                layer = _replacement(module, fqn, u, s, vt, r, chosen or _recipe(module))
                weight = weight.detach().double()
                product = layer.left.weight.detach().double() @ layer.right.weight.detach().double()
                error = (product - weight).norm() / weight.norm().clamp_min(
                    torch.finfo(torch.float64).tiny)
                entries.append(FactorEntry(fqn, True, "", shape, r, float(error), count, smaller))
                fresh[fqn] = layer
                continue
            reason = f"rank {r} would have {smaller} parameters"
        entries.append(FactorEntry(fqn, False, reason, shape, min(shape), 0.0, count, count))
    for fqn, layer in fresh.items():
        model = _put(model, fqn, layer)
    return Factorization(model, entries)


def merge(model: nn.Module) -> nn.Module:
    """Make every :class:`LowRankLinear` of ``model`` one layer again, of weight left right.

    It becomes a :class:`lowp.Linear` of the same recipe and activation, an ``nn.Linear`` where that
    is fp32 without one, and transformers' ``Conv1D`` where :func:`factorize` took one apart.

    Returns:
        ``model`` itself; what a root that is such a layer becomes.
    """
    for fqn, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LowRankLinear)]:
        weight, left = layer.weight.detach(), layer.left
        recipe, activation = layer.recipe, getattr(left, "activation", "none")
        module: Any
        if layer.merges_into == "Conv1D":
            from transformers import pytorch_utils

            module = pytorch_utils.Conv1D(  # type: ignore[no-untyped-call, unused-ignore]
                layer.out_features, layer.in_features)
            weight = weight.t().contiguous()
        else:
            module = nn.Linear(layer.in_features, layer.out_features, left.bias is not None,
                               device="meta")
        module.weight = nn.Parameter(weight, requires_grad=left.weight.requires_grad)
        module.bias = left.bias
        if layer.merges_into == "Linear":
            if recipe.name != "fp32" or activation != "none":
                module.__class__ = Linear
                module.adopt(recipe, fqn, activation)
        elif recipe.name != "fp32":
            from lowp.conv1d import Conv1D

            module.__class__ = Conv1D
            module.adopt(recipe, fqn)
        model = _put(model, fqn, module.train(layer.training))
    return model
