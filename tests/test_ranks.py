"""The same bits on 1, 2 and 4 ranks: DDP, FSDP2, resharding; gloo processes under torchrun."""

from __future__ import annotations

import pytest

import lowp
from tests import rank_cases
from tests.torchrun import launch

NAMES = {n: [k for k, (worlds, _) in rank_cases.CASES.items() if n in worlds] for n in (2, 4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the ranks meet, with what one process saved after 25 steps."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, dtype, state in rank_cases.RESHARDED:
        module = rank_cases.Parameters(dtype)
        optimizer = rank_cases.MAKE[name](module.named_parameters(), state_dtype=state)
        rank_cases.advance(module, optimizer, range(25))
        rank_cases.keep(module, optimizer, folder / f"{name}-1")
    return folder


@pytest.fixture(scope="module")
def two(folder):
    return launch("tests.rank_cases", 2, folder)


@pytest.fixture(scope="module")
def four(folder, two):
    return launch("tests.rank_cases", 4, folder)


@pytest.mark.parametrize("case", NAMES[2])
def test_two_ranks(two, case):
    assert two.get(case, "not reached") == ""


@pytest.mark.parametrize("case", NAMES[4])
def test_four_ranks(four, case):
    assert four.get(case, "not reached") == ""


@pytest.mark.parametrize(("name", "dtype", "state"), rank_cases.RESHARDED)
def test_one_two_four_ranks_and_back(folder, four, name, dtype, state):
    """25 steps on each, through torch.distributed.checkpoint: equal to 100 steps in one process."""
    plain = rank_cases.Parameters(dtype)
    one = rank_cases.MAKE[name](plain.named_parameters(), state_dtype=state)
    rank_cases.advance(plain, one, range(100))
    module, optimizer = rank_cases.resume(folder / f"{name}-4", name, dtype, state, False)
    other = rank_cases.MAKE[name](module.named_parameters())
    lowp.optim.load_state(other, folder / f"{name}-4.safetensors")
    rank_cases.assert_same_states(other, module, optimizer, module)
    rank_cases.advance(module, optimizer, range(75, 100))
    rank_cases.assert_same(module, plain)
    rank_cases.assert_same_states(optimizer, module, one, plain)
