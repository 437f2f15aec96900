"""Streaming takes O(n + m) memory: measured as the peak of a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, warnings
import torch
import sbot

n = 8_000
gen = torch.Generator().manual_seed(0)
x, y = torch.randn(n, 3, generator=gen), torch.randn(n, 3, generator=gen) + 1
sbot.solve_bridge(x[:50], y[:50], 1.0, solver=sbot.Sinkhorn(memory=0)).cost()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
bridge = sbot.solve_bridge(x.requires_grad_(), y, 0.3, solver=sbot.Sinkhorn(max_iter=5, memory=2**27))
bridge.cost().backward()
bridge.gap(), bridge.linear_cost(), bridge.transport(x[:1000].detach()), bridge.sample_pairs(1000)
bridge.sparse_plan(0.5, max_per_row=5), bridge.top(3), bridge.apply(torch.ones(n)), bridge.perplexity(), bridge.bounds()
assert any("streamed" in note for note in bridge.report.notes), bridge.report.notes
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's getrusage")
def test_streaming_memory():
    """A dense cost alone would be 256 MB here; values, gradients, the gap, maps and whatever is made of the plan stream too."""
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 150 * 2**20


LEAN = """
import sys
import torch
import sbot

x = torch.rand(5, 2, requires_grad=True)
for cost in (None, sbot.Lp(1)):
    bridge = sbot.solve_bridge(x, x.detach() + 1, 0.5, cost=cost)
    (bridge.cost() + bridge.differentiable().transport().sum()).backward()
sbot.solve_bridge(torch.rand(2, 5, 2), torch.rand(2, 5, 2), 0.5)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"sympy", "mpmath"}))
"""


def test_nothing_loads_algebra():
    """Torch imports SymPy, 30 MB and a second, for a gradient through anything but one number, and for an index unravelled."""
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", LEAN], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
