"""What mypy --strict makes of a user's lines: the types of what comes back, and an error for each wrong argument."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USER = """
import torch
from torch import Tensor, nn

import esam_kernels
from esam_kernels import ESAM, SAM, cross_entropy

model = nn.Linear(4, 3)
x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, model=model)
sam = SAM(model.parameters(), torch.optim.SGD, lr=0.1)


def losses(inputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(model(inputs), targets)


def with_logits(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(inputs)
    return cross_entropy(logits, targets), logits


def closure() -> Tensor:
    loss = losses(x, y).mean()
    torch.autograd.backward(loss)
    return loss


reveal_type(optimizer.step(losses, x, y))
reveal_type(optimizer.step(with_logits, x, y))
reveal_type(sam.step(closure))
reveal_type(optimizer.select(losses(x, y), losses(x, y), x))
reveal_type(optimizer.select(losses(x, y), None, x, {"y": y}))
reveal_type(esam_kernels.__version__)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
"""
REVEALED = [
    "Tensor",
    "tuple[Tensor, Any]",
    "Tensor",
    "Tensor",
    "tuple[Tensor, dict[str, Tensor]]",
    "str",
]
WRONG = [
    'ESAM(model.parameters(), torch.optim.SGD, rho="large")',
    "ESAM(model.parameters(), torch.optim.SGD, model=3)",
    "optimizer.select(x)",
    "optimizer.step(losses, x, y, micro_batch=0.5)",
    "cross_entropy(x, y, label_smoothing=None)",
]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Each line of what mypy says: (line number, level, message)."""
    pytest.importorskip("mypy")
    path = tmp_path_factory.mktemp("user") / "user.py"
    path.write_text(USER + "\n".join(WRONG) + "\n")
    config = path.with_name("mypy.ini")
    config.write_text("[mypy]\nstrict = True\n")
    # Beside the compiled cache of the lint, which other options have filled.
    cache = ROOT / ".mypy_cache" / "user"
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(cache), str(path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.findall(r"user\.py:(\d+): (\w+): (.*)", process.stdout)
    assert found, process.stdout + process.stderr
    return [(int(line), level, message) for line, level, message in found]


def test_what_comes_back_has_the_type_of_what_went_in(said):
    revealed = [re.sub(r"builtins\.|torch\._tensor\.", "", message) for _, level, message in said if level == "note"]
    assert [text.removeprefix('Revealed type is "').rstrip('"') for text in revealed if "Revealed" in text] == REVEALED


def test_a_users_lines_have_no_error_and_each_wrong_argument_has_one(said):
    first = USER.count("\n") + 1
    errors = {line for line, level, _ in said if level == "error"}
    assert errors == set(range(first, first + len(WRONG)))
