"""What a run shows: one table, one plot, one JSON file."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from itertools import accumulate
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

import esam_kernels

# Okabe and Ito's palette: distinct for colour-blind readers as well.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")

# One training: optimizer, seed, images (in an epoch), sharpness, and history, a list with a dict for each epoch.
Result = dict[str, Any]


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a run was made."""
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "esam_kernels": esam_kernels.__version__,
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of this program, marked where files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def summarise(results: list[Result]) -> list[dict[str, Any]]:
    """A row for each optimizer, over its seeds. ``cost`` is counted, in units of the base optimizer's step."""
    rows = []
    for name in dict.fromkeys(result["optimizer"] for result in results):
        own = [result for result in results if result["optimizer"] == name]
        seconds = elapsed_seconds([result["history"] for result in own])
        rows.append(
            {
                "optimizer": name,
                "seeds": len(own),
                "test_accuracy": spread([result["history"][-1]["test_accuracy"] for result in own]),
                "train_loss": spread([result["history"][-1]["train_loss"] for result in own]),
                "sharpness": spread([result["sharpness"] for result in own]),
                "cost": mean(entry["cost"] for result in own for entry in result["history"]),
                "images_per_second": len(seconds) * own[0]["images"] / seconds[-1],
            }
        )
    for row in rows:
        for other in ("sam", "sgd"):
            speed = next((r["images_per_second"] for r in rows if r["optimizer"] == other), None)
            row[f"speed_to_{other}"] = None if speed is None else row["images_per_second"] / speed
    return rows


def digest(rows: list[dict[str, Any]]) -> str:
    """What an image carries that is drawn from these rows: the images of other rows carry another one."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds (None for a single one)."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "values": values}


def table(rows: list[dict[str, Any]]) -> str:
    head = ("optimizer", "test accuracy %", "images/s", "x SAM", "x SGD", "counted cost", "sharpness", "train loss")
    lines = [head]
    for row in rows:
        ratios = [row["speed_to_sam"], row["speed_to_sgd"]]
        lines.append(
            (
                row["optimizer"],
                plus_minus(row["test_accuracy"], 1),
                f"{row['images_per_second']:,.0f}",
                *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                f"{row['cost']:.2f}",
                plus_minus(row["sharpness"], 4),
                plus_minus(row["train_loss"], 3),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    aligned = [(line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))) for line in lines]
    return "\n".join("  ".join(line) for line in aligned)


def learned(rows: list[dict[str, Any]]) -> list[str]:
    """What the table says of ESAM beside the others, in one line; none where it has nobody to be compared with."""
    esam = next((row for row in rows if row["optimizer"].startswith("esam")), None)
    others = [row for row in rows if row["optimizer"] in ("sgd", "sam")]
    if esam is None or not others:
        return []
    found = []
    for other in others:
        points = esam["test_accuracy"]["mean"] - other["test_accuracy"]["mean"]
        speed = esam[f"speed_to_{other['optimizer']}"]
        more = "more" if points >= 0.0 else "less"
        found.append(f"{abs(points):.1f} points {more} accurate than {other['optimizer']} at {speed:.2f} x its speed")
    return [f"learned: {esam['optimizer']} is {', and '.join(found)}"]


def plus_minus(value: dict[str, Any], digits: int) -> str:
    deviation = "" if value["std"] is None else f" +- {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{deviation}"


def write_json(path: Path, device: torch.device, options: dict[str, Any], results: list[Result]) -> None:
    report = {"environment": environment(device), "options": options, "rows": summarise(results), "results": results}
    path.write_text(json.dumps(report, indent=1) + "\n")


def plot(path: Path, title: str, results: list[Result], against: str = "training time (s)") -> None:
    """Test accuracy and training loss: the mean over the seeds, and a band from lowest to highest.

    ``against`` is the horizontal axis, "training time (s)" or "epoch".
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, color in zip(dict.fromkeys(result["optimizer"] for result in results), COLORS):
        histories = [result["history"] for result in results if result["optimizer"] == name]
        position = elapsed_seconds(histories) if against != "epoch" else [entry["epoch"] for entry in histories[0]]
        for axis, key in zip(axes, ("test_accuracy", "train_loss")):
            values = [[entry[key] for entry in epoch] for epoch in zip(*histories)]
            axis.plot(position, [mean(v) for v in values], color=color, label=name, marker=".", markersize=4)
            axis.fill_between(position, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15)
    for axis, label in zip(axes, ("test accuracy (%)", "training loss")):
        axis.set(xlabel=against, ylabel=label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, loc="upper right")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def elapsed_seconds(histories: list[list[dict[str, float]]]) -> list[float]:
    """Time that training has taken after each epoch, evaluation not counted.

    An epoch takes the median over the seeds: where something else slowed the machine down for one, it does not count.
    """
    return list(accumulate(median(entry["seconds"] for entry in epoch) for epoch in zip(*histories)))
