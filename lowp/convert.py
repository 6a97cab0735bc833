"""A model's linear layers into lowp's and back, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from lowp.experts import Experts, converted, is_fused, refusal
from lowp.linear import Linear
from lowp.lstm import LSTM
from lowp.recipe import Recipe, recipe_of

Filter = Callable[[nn.Module, str], bool]
HEADS = ("lm_head", "embed_out", "output_projection")


class PlanEntry(NamedTuple):
    """What :func:`convert` would do with one module that holds a linear map, and why."""

    fqn: str
    converts: bool
    reason: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        verdict = "convert" if self.converts else "keep"
        return f"{verdict:8}{self.fqn or '(root)'}  {list(self.shape)}  {self.reason}"


class Plan(list[PlanEntry]):
    """The entries of every module that holds a matrix of its own; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no linear layer found"


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, told without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _lowp_types() -> tuple[type[nn.Module], ...]:
    import sys

    conv1d = sys.modules.get("lowp.conv1d")
    return (Linear, Experts) if conv1d is None else (Linear, Experts, conv1d.Conv1D)


def _foreign(module: nn.Module) -> tuple[str, tuple[int, ...]] | None:
    """Why a module that holds a matrix of its own is not converted, and its shape.

    Embeddings, norms and convolutions are no such modules.
    """
    if isinstance(module, nn.RNNBase):
        reason = f"nn.{type(module).__name__}: lowp.LSTM has nn.LSTM's arguments and state_dict"
        if isinstance(module, LSTM):
            reason = f"lowp.LSTM: its input projections run by {module.recipe.name}"
        return reason, tuple(module.get_parameter("weight_ih_l0").shape)
    own = type(module).__module__
    if own.startswith("torch.") and not isinstance(module, nn.MultiheadAttention | nn.Bilinear):
        return None
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() in (2, 3):
            return (f"{type(module).__name__} holds {name!r} itself, outside any nn.Linear",
                    tuple(parameter.shape))
    return None


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that more than one module holds: tied weights."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _candidates(model: nn.Module,
                filter_fn: Filter | None) -> Iterator[tuple[nn.Module, PlanEntry]]:
    tied = shared_parameters(model)
    for fqn, module in model.named_modules():
        fused = is_fused(module)
        if not isinstance(module, nn.Linear) and not _is_conv1d(module) and not fused \
                and not isinstance(module, _lowp_types()):
            found = _foreign(module)
            if found is not None:
                yield module, PlanEntry(fqn, False, *found)
            continue
        weight: Any = module.down_proj if fused else module.weight
        kind = "nn.Linear" if isinstance(module, nn.Linear) else \
            f"{weight.shape[0]} experts in 3-D parameters" if fused else "Conv1D"
        converts, reason = True, kind
        if isinstance(module, _lowp_types()):
            reason = "already lowp: its recipe is replaced"
        elif fused and refusal(module) is not None:
            converts, reason = False, str(refusal(module))
        elif not fused and type(module) is not nn.Linear and not _is_conv1d(module):
            converts, reason = False, f"a subclass of nn.Linear: {type(module).__name__}"
        if converts and filter_fn is not None:
            converts = filter_fn(module, fqn)
            reason = reason if converts else "filter_fn said no"
        elif converts and fqn.rpartition(".")[2] in HEADS:
            converts, reason = False, "the language model head: its errors reach the loss directly"
        elif converts and id(weight) in tied:
            converts, reason = False, "its weight is tied to another module's"
        yield module, PlanEntry(fqn, converts, reason, tuple(weight.shape))


def plan(model: nn.Module, precision: str | int | Recipe = "int8",
         filter_fn: Filter | None = None) -> Plan:
    """What :func:`convert` would change, what not, and why; changes nothing.

    Args and raises: as :func:`convert`.
    """
    recipe_of(precision)
    return Plan(entry for _, entry in _candidates(model, filter_fn))


def convert(model: nn.Module, precision: str | int | Recipe = "int8",
            filter_fn: Filter | None = None) -> nn.Module:
    """Make the linear layers of ``model`` lowp layers, in place.

    Modules stay the same objects with the same parameters, so ties, hooks, optimizers and
    checkpoints are untouched. Each layer's random bits are keyed by its qualified name.

    Args:
        model: any module; ``nn.Linear``, transformers' ``Conv1D`` and its experts in 3-D parameters
            (Mixtral and its kin) are converted, subclasses of ``nn.Linear`` are not, nor are
            routers, whose errors would send a token to another expert.
        precision: as :class:`lowp.Linear` takes it.
        filter_fn: ``(module, fqn) -> bool``, which to convert. By default language model heads and
            tied weights are left alone; a filter replaces that rule.

    Returns:
        ``model`` itself.

    Raises:
        ValueError, TypeError: an unknown precision; nothing is changed then.
    """
    recipe = recipe_of(precision)
    for module, entry in list(_candidates(model, filter_fn)):
        if not entry.converts:
            continue
        if isinstance(module, _lowp_types()):
            setattr(module, "recipe", recipe)  # noqa: B010 (of either type)
        elif isinstance(module, nn.Linear):
            module.__class__ = Linear
            assert isinstance(module, Linear)
            module.adopt(recipe, entry.fqn)
        elif is_fused(module):
            module.__class__ = converted(type(module))
            module.adopt(recipe, entry.fqn)  # type: ignore[operator]
        else:
            from lowp.conv1d import Conv1D

            module.__class__ = Conv1D
            module.adopt(recipe, entry.fqn)  # type: ignore[operator]
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert`, in place: exact ``nn.Linear``, ``Conv1D`` and expert modules again.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a layer has a fused activation, which ``nn.Linear`` lacks; nothing is changed.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, _lowp_types())]
    for fqn, module in layers:
        if getattr(module, "activation", "none") != "none":
            raise ValueError(
                f"lowp.revert: layer {fqn!r} has the fused activation {module.activation!r}, "
                "which nn.Linear lacks"
            )
    for _, module in layers:
        for attribute in ("recipe", "activation", "noise_id", "noise_ids"):
            module.__dict__.pop(attribute, None)
        place = 2 if isinstance(module, Experts) else 1  # of the class it had, among its bases
        module.__class__ = nn.Linear if isinstance(module, Linear) else type(module).__mro__[place]
    return model
