"""Runs lowp's optimizers on PyTorch's own optimizer test inputs; a script of test_optim_family."""

from __future__ import annotations

import copy
import re
import warnings

import torch
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from lowp import optim

KNOWN = {"Adam", "AdamW", "SGD", "Adafactor", "Muon"}
LIMITS = "lr as Tensor doesn.t work|as a Tensor is not supported for capturable=False"
"""Inputs that torch refuses as one of its implementations lacks them; ours takes them."""


def check_updates(ours: type, theirs: type, kwargs: dict, matrices: bool, dtype: torch.dtype,
                  exact: bool) -> None:
    """10 steps on a small net: finite and moving; with ``exact`` torch's weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=not matrices), nn.Sigmoid(),
                          nn.Linear(6, 3, bias=not matrices), nn.Sigmoid()).to(dtype)
    twin = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    plain = {k: tuple(map(float, v)) if k == "betas" else v for k, v in kwargs.items()
             if k != "capturable"}
    a = ours(model.parameters(), **copy.deepcopy(kwargs))
    b = theirs(twin.parameters(), **copy.deepcopy(plain)) if exact else None
    x = torch.rand(5, 4, dtype=dtype)
    for _ in range(10):
        for module, optimizer in ((model, a), (twin, b)):
            if optimizer is not None:
                optimizer.zero_grad()
                module(x).float().square().sum().backward()
                optimizer.step()
    for p, q, old in zip(model.parameters(), twin.parameters(), start, strict=True):
        assert p.isfinite().all() and not torch.equal(p, old)
        if exact:
            torch.testing.assert_close(p, q)


def check_error(ours: type, case: object) -> None:
    """The error, or warning, that torch's own optimizer raises for the input."""
    if re.search(LIMITS, case.optimizer_error_input.desc):
        ours([nn.Parameter(torch.randn(2, 3))], **case.optimizer_error_input.kwargs)
        return
    given, kind, pattern = case.optimizer_error_input, case.error_type, case.error_regex
    params = given.params if given.params is not None else [nn.Parameter(torch.randn(2, 3))]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            optimizer = ours(params, **given.kwargs)
            if case.error_on == OptimizerErrorEnum.STEP_ERROR:
                optimizer.step()
        except Exception as error:
            assert isinstance(error, kind) and re.search(pattern, str(error)), (given.desc, error)
            return
    assert issubclass(kind, Warning), given.desc
    assert any(issubclass(w.category, kind) and re.search(pattern, str(w.message)) for w in seen)


def main() -> None:
    known = [info for info in optim_db if info.optim_cls.__name__ in KNOWN]
    inputs = errors = 0
    for info in known:
        name = info.optim_cls.__name__
        ours, matrices = getattr(optim, name), name == "Muon"
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for device in ("cpu", "cuda"):  # "cuda" adds inputs; they run on the CPU too
                for given in info.optim_inputs_func(device=device, dtype=dtype):
                    exact = dtype == torch.float32 and not matrices
                    check_updates(ours, info.optim_cls, given.kwargs, matrices, dtype, exact)
                    inputs += 1
        for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            check_error(ours, case)
            errors += 1
    print(f"{len(known)} optimizers, {inputs} inputs, {errors} errors")


if __name__ == "__main__":
    main()
