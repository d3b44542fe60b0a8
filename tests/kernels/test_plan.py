"""Recorded launches: they need compiled kernels, so a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maect_fast.kernels._common import plan

SCRIPT = Path(__file__).with_name("planned_calls.py")


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler")
@pytest.mark.parametrize("which", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_plans_launch_what_the_launchers_do(which: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("right") >= 6


def test_interpreted_launches_are_not_recorded() -> None:
    plans = plan.Plans()
    x = torch.ones(4)
    found = plans.record(lambda: (x + 1,), (x,), ())
    assert torch.equal(found[0], x + 1)
    assert not plans._plans
    assert plans.replay((x,), ()) is None


def test_what_is_no_launch_is_seen() -> None:
    x = torch.ones(4, 4)
    with plan._Watch() as watch:
        y = x.new_empty(2)
        x[1:].view(-1)
        torch.promote_types(torch.float16, torch.float32)
    assert [z.data_ptr() for z in watch.allocated] == [y.data_ptr()]
    assert not watch.others
    with plan._Watch() as watch:
        x.sum()
    assert len(watch.others) == 1


def test_addresses_are_told_apart_or_not_at_all() -> None:
    x = torch.ones(4, 8)
    tensors: list[Tensor | None] = [x, None, torch.ones(3)]
    assert plan._find(x, tensors) == (0, 0)
    assert plan._find(x[1:], tensors) == (0, 32)
    for unclear in (x[2:], torch.ones(1)):
        with pytest.raises(plan._UnclearError):
            plan._find(unclear, [*tensors, x[1:]])
