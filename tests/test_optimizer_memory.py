"""What training processes hold, by the kernel's account of them."""

from __future__ import annotations

import sys

import pytest

from benchmarks.optimizer_memory import row_of


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_processes_hold_what_their_tensors_add_up_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """8.4 M parameters: no byte less, and bf16 with int8 states at most half of fp32 AdamW's."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**17))  # freed tensors go back at once
    peak = {}
    for name in ("fp32, torch fused AdamW", "bf16, int8 states",
                 "bf16, int8 states, gradient release"):
        row = row_of(name, 8, 1024)
        peak[name] = row["peak bytes/param"]
        # the process that it is compared with has a layer too, of 128 x 128
        assert peak[name] >= row["computed bytes/param"] - 16 * 128**2 / row["parameters"], row
    full, coded, released = peak.values()
    assert coded <= full / 2 and released <= coded - 1.5, "all gradients but one layer's 1/4 byte"
