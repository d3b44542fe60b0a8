"""Time every op beside eager PyTorch on this machine: `python -m benchmarks [--op NAME]`.

A provider must first give the baseline's numbers; one that does not gets no time. Providers take
turns, so that what else the machine does meets all of them alike.
"""

import argparse
import time
from collections.abc import Callable
from statistics import quantiles

import torch
from torch import Tensor

from benchmarks.ops import CASES, Case

ROUNDS, WARMUP = 15, 3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--op", choices=sorted({case.op for case in CASES}), help="default: all")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads\n")
    print("| op | shape | provider | p50 ms | p20 | p80 | to eager |")
    print("|---|---|---|---:|---:|---:|---:|")
    for case in CASES:
        if options.op in (None, case.op):
            report(case, device)


def report(case: Case, device: torch.device) -> None:
    """One line per provider, the baseline (eager PyTorch) first."""
    providers = case.make(device)
    baseline = next(iter(providers))
    expected = providers[baseline]()
    wrong = {name: difference(call(), expected) for name, call in providers.items()}
    good = {name: call for name, call in providers.items() if wrong[name] <= case.tolerance}
    times = {name: sorted(values) for name, values in interleaved(good, device).items()}
    middle = {name: quantiles(values, n=10)[4] for name, values in times.items()}
    for name in providers:
        cells = [case.op, case.shape, name]
        if name in good:
            deciles = quantiles(times[name], n=10)
            cells += [f"{1e3 * s:.2f}" for s in (deciles[4], deciles[1], deciles[7])]
            cells.append(f"{middle[name] / middle[baseline]:.2f}")
        else:
            cells += [f"wrong by {wrong[name]:.2g}", "", "", ""]
        print(f"| {' | '.join(cells)} |", flush=True)


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest error relative to the largest value, over all results."""
    errors = [
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(found, expected, strict=True)
    ]
    return max(errors)


def interleaved(
    providers: dict[str, Callable[[], tuple[Tensor, ...]]], device: torch.device
) -> dict[str, list[float]]:
    """Seconds per call; the providers take turns."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(WARMUP + ROUNDS):
        for name, call in providers.items():
            synchronize(device)
            began = time.perf_counter()
            call()
            synchronize(device)
            if turn >= WARMUP:
                times[name].append(time.perf_counter() - began)
    return times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
