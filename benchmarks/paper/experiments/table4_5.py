"""Tables 4 and 5: how much of SAM's overhead SWP saves on deep MLPs, and the formula fitted to it (appendix A.4)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.clocks import clock_of
from benchmarks.harness import quantiles
from benchmarks.paper import plotting
from benchmarks.paper.experiment import Claim, Experiment, Settings, Unit
from benchmarks.rows import Row, device_name

BETAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
KINDS = {"K = 1": "Table 4", "K > 1": "Table 5"}
# g(N, beta) as the tables print it, in percent.
PAPER = {
    "K = 1": {
        50: {0.9: 3.42, 0.5: 16.28, 0.1: 30.08},
        75: {0.9: 3.44, 0.5: 15.79, 0.1: 30.42},
        100: {0.9: 3.37, 0.5: 15.86, 0.1: 29.56},
        125: {0.9: 2.94, 0.5: 14.87, 0.1: 29.42},
    },
    "K > 1": {
        25: {0.9: 2.88, 0.5: 15.54, 0.1: 30.03},
        50: {0.9: 2.34, 0.5: 15.10, 0.1: 29.83},
        65: {0.9: 2.23, 0.5: 14.95, 0.1: 29.22},
        75: {0.9: 2.22, 0.5: 15.10, 0.1: 28.68},
    },
}
PAPER_FIT = {"K = 1": (0.3185, 0.1310, 0.9983), "K > 1": (0.3143, 0.0737, 0.9989)}
WARM_UP = 3


class DeepMLP(nn.Module):
    """``depth`` fully connected layers without bias: a weight matrix is a unit that SWP draws.

    With ``units`` = 2, each layer has two matrices, one for the layer before and one for that before it.
    """

    def __init__(self, depth: int, width: int, units: int) -> None:
        super().__init__()
        self.units = units
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(width, width) * math.sqrt(2.0 / width)) for _ in range(depth * units)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """(b, width) to (b, width); scaled so that activations neither vanish nor explode with the depth."""
        before = hidden = inputs
        weights = iter(self.weights)
        for weight in weights:
            total = hidden @ weight
            if self.units == 2:
                total = (total + before @ next(weights)) / math.sqrt(2.0)
            before, hidden = hidden, total.relu()
        return hidden


def drawn_units(weights: Sequence[Tensor], beta: float, uniform: Tensor) -> list[Tensor]:
    """Those whose number in ``uniform`` is below beta; the one with the lowest number where none is."""
    threshold = max(beta, uniform.min().item())
    return [weight for weight, number in zip(weights, uniform.tolist()) if number <= threshold]


def saved_shares(model: DeepMLP, inputs: Tensor, rounds: int, seed: int) -> dict[float, list[float]]:
    """For each beta, the share of pass 1 (forward and backward, SAM's overhead) that SWP saves, round by round.

    A pass in which only the drawn units get gradients is timed next to one with all. Every other round draws by 1 - u
    instead of u: the number of units drawn is then closer to its mean over the rounds.
    """
    weights = list(model.weights)
    clock = clock_of(inputs.device)
    generator = torch.Generator().manual_seed(seed)

    def seconds(units: list[Tensor]) -> float:
        for weight in weights:
            weight.grad = None
        return clock(lambda: model(inputs).square().mean().backward(inputs=units))

    for _ in range(WARM_UP):
        seconds(weights)
    shares: dict[float, list[float]] = {beta: [] for beta in BETAS}
    uniform = torch.empty(len(weights))
    for number in range(rounds):
        uniform = 1.0 - uniform if number % 2 else torch.rand(len(weights), generator=generator)
        for beta in BETAS:
            everything = seconds(weights)
            shares[beta].append(1.0 - seconds(drawn_units(weights, beta, uniform)) / everything)
    return shares


def units(settings: Settings) -> list[Unit]:
    width = settings.choose(smoke=32, small=512, paper=3000)
    rounds = settings.choose(smoke=2, small=16, paper=40)
    found = []
    for kind, table in PAPER.items():
        for depth in settings.choose(smoke=(2, 4), small=(10, 20, 40), paper=tuple(table)):
            made_with = {"width": width, "batch": 128, "rounds": rounds, "device": device_name(settings.device)}
            made_with["threads"] = torch.get_num_threads()
            for seed in settings.seeds:
                run = measurement(settings, kind, depth, seed, width, rounds)
                found.append(Unit(f"{kind}/N {depth}/seed {seed}", run, "random inputs", seed, made_with))
    return found


def measurement(
    settings: Settings, kind: str, depth: int, seed: int, width: int, rounds: int
) -> Callable[[], list[Row]]:
    def run() -> list[Row]:
        model = DeepMLP(depth, width, units=1 if kind == "K = 1" else 2).to(settings.device)
        inputs = torch.randn(128, width, device=settings.device)
        rows = []
        for beta, shares in saved_shares(model, inputs, rounds, seed).items():
            p20, p50, p80 = (round(value, 5) for value in quantiles(shares))
            numbers = {"saved": p50, "saved_p20": p20, "saved_p80": p80, "rounds": len(shares)}
            rows.append({"kind": kind, "depth": depth, "beta": beta, **numbers})
        return rows

    return run


def fit(points: Sequence[tuple[int, float, float]]) -> tuple[float, float, float]:
    """k1, k2 and R^2 of g = k1 (1 - beta) + k2 (1 - beta) / (N beta), Equations 11 and 12, by least squares.

    ``points`` are (N, beta, g); two of them at least, with different N beta.
    """
    features = torch.tensor([[1 - b, (1 - b) / (n * b)] for n, b, _ in points], dtype=torch.float64)
    values = torch.tensor([[g] for *_, g in points], dtype=torch.float64)
    solution = torch.linalg.lstsq(features, values).solution
    residual = (values - features @ solution).square().sum()
    k1, k2 = solution.flatten().tolist()
    return k1, k2, 1.0 - (residual / (values - values.mean()).square().sum()).item()


def means(rows: Sequence[Row], kind: str) -> dict[tuple[int, float], float]:
    """The saved share by (N, beta), over the seeds."""
    own = [row for row in rows if row["kind"] == kind]
    keys = sorted({(row["depth"], row["beta"]) for row in own})
    return {k: statistics.mean(row["saved"] for row in own if (row["depth"], row["beta"]) == k) for k in keys}


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for kind, table in KINDS.items():
        own = [row for row in rows if row["kind"] == kind]
        saved = means(own, kind)
        depths = sorted({depth for depth, _ in saved})
        for beta in (0.9, 0.5, 0.1):
            printed = {depth: values[beta] for depth, values in PAPER[kind].items()}
            here = ", ".join(f"{100 * saved[depth, beta]:.1f} % (N = {depth})" for depth in depths)
            text = f"{kind}, beta = {beta}: share of SAM's overhead (pass 1) that SWP saves"
            paper = ", ".join(f"{value} % (N = {depth})" for depth, value in printed.items())
            found.append(Claim(text, f"{paper}; {table}", here or None, None, own))
        found += [growth(kind, saved, depths, own), fitted(kind, saved, own)]
    return found


def growth(kind: str, saved: dict[tuple[int, float], float], depths: Sequence[int], rows: Sequence[Row]) -> Claim:
    """What is saved grows with 1 - beta: between any two neighbours among all the betas, at every depth."""
    text = f"{kind}: what is saved grows with 1 - beta, at every step of 0.1 and every N"
    paper = '"positively correlated to 1 - beta" (section 2.2)'
    if not depths:
        return Claim(text, paper)
    steps = [saved[depth, low] > saved[depth, high] for depth in depths for low, high in pairwise(BETAS)]
    return Claim(text, paper, f"at {sum(steps)} of {len(steps)} steps", all(steps), rows)


def fitted(kind: str, saved: dict[tuple[int, float], float], rows: Sequence[Row]) -> Claim:
    text = f"{kind}: fit of g(N, beta) = k1 (1 - beta) + k2 (1 - beta) / (N beta)"
    paper = "k1 = {:.4f}, k2 = {:.4f}, R^2 = {:.4f}; {}".format(*PAPER_FIT[kind], KINDS[kind])
    if not saved:
        return Claim(text, paper)
    k1, k2, r2 = fit([(depth, beta, share) for (depth, beta), share in saved.items()])
    return Claim(text, paper, f"k1 = {k1:.4f}, k2 = {k2:.4f}, R^2 = {r2:.4f}", None, rows)


def figure(rows: Sequence[Row], path: Path) -> None:
    with plotting.figure(path, "Share of SAM's overhead that SWP saves", rows, panels=2, sharey=True) as axes:
        for axis, kind in zip(axes, KINDS):
            saved = means(rows, kind)
            for color, depth in zip(plotting.COLORS[1:], sorted({depth for depth, _ in saved})):
                points = [(1 - beta, 100 * share) for (n, beta), share in saved.items() if n == depth]
                axis.plot(*zip(*sorted(points)), "o-", color=color, markersize=4, label=f"measured, N = {depth}")
            printed = [(1 - beta, g) for values in PAPER[kind].values() for beta, g in values.items()]
            axis.plot(*zip(*printed), "x", color="#000000", label=f"{KINDS[kind]}, all N")
            axis.set(title=kind, xlabel="1 - beta")
            axis.legend(frameon=False, fontsize=8, loc="upper left")
        axes[0].set_ylabel("saved share of pass 1 (%)")


EXPERIMENT = Experiment(
    name="table4-5",
    title="overhead saved by SWP on deep MLPs",
    paper=(
        "Two MLPs with layers of 3,000 x 3,000. In the first (K = 1, Table 4) a layer has one weight. In the second "
        "(K > 1, Table 5) it has several, connected across layers. The overhead over the base optimizer is pass 1. "
        "g(N, beta) is the share of it that SWP saves with N layers; k1 and k2 are fitted by linear regression. The "
        "paper does not draw its second network: here each layer has two weights, one for each of the two layers "
        "before it. At beta = 1 nothing is left out, and what is measured there is the noise."
    ),
    units=units,
    claims=claims,
    figure=figure,
    seeds={"smoke": 1, "small": 2, "paper": 3},
)
