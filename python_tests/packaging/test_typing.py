"""What mypy --strict and pyright make of a user's lines: the types of what comes back, an error for each mistake."""

import importlib.util
import json
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
from esam_kernels import ESAM, SAM, RankingContext, cross_entropy, schedules

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


def ranking(context: RankingContext) -> Tensor:
    return context.losses


groups = esam_kernels.normalization_groups(model, rho=0.05)
ranked = ESAM(groups, torch.optim.AdamW(groups), ranking=ranking)
schedules.PhaseSchedule(optimizer, "rho", 0.05, start=70).step()
with esam_kernels.frozen_batch_norm(model):
    optimizer.backward(losses(x, y).mean())
optimizer.first_step(zero_grad=True)
optimizer.second_step(zero_grad=True)

reveal_type(optimizer.step(losses, x, y))
reveal_type(optimizer.step(with_logits, x, y))
reveal_type(sam.step(closure))
reveal_type(optimizer.select(losses(x, y), losses(x, y), x))
reveal_type(optimizer.select(losses(x, y), None, x, {"y": y}))
reveal_type(esam_kernels.select(losses(x, y), losses(x, y), 4))
reveal_type(esam_kernels.gather(torch.tensor([1]), x))
reveal_type(esam_kernels.gather(torch.tensor([1]), x, {"y": y}))
reveal_type(esam_kernels.make_graphed_step(optimizer, losses, x, y)(x, y))
reveal_type(esam_kernels.make_graphed_step(optimizer, with_logits, x, y)(x, y))
reveal_type(optimizer.relative_cost)
reveal_type(esam_kernels.__version__)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
"""
REVEALED = [
    "Tensor",
    "tuple[Tensor, Any]",
    "Tensor",
    "Tensor",
    "tuple[Tensor, dict[str, Tensor]]",
    "Tensor",
    "Tensor",
    "tuple[Tensor, dict[str, Tensor]]",
    "Tensor",
    "tuple[Tensor, Any]",
    "float",
    "str",
]
WRONG = [
    'ESAM(model.parameters(), torch.optim.SGD, rho="large")',
    "ESAM(model.parameters(), torch.optim.SGD, model=3)",
    "optimizer.select(x)",
    "optimizer.step(losses, x, y, micro_batch=0.5)",
    "optimizer.step(closure, max_grad_norm=1.0)",
    "cross_entropy(x, y, label_smoothing=None)",
    "esam_kernels.gather([1], x)",
    "esam_kernels.make_graphed_step(model, losses, x, y)",
    'schedules.PhaseSchedule(optimizer, "rho", 0.05)',
]


Said = list[tuple[int, str, str]]


def mypy(path: Path) -> Said:
    """Each line of what mypy says: (line number, level, message)."""
    config = path.with_name("mypy.ini")
    config.write_text("[mypy]\nstrict = True\n")
    # Beside the compiled cache of the lint, which other options have filled.
    cache = ROOT / ".mypy_cache" / "user"
    said = output("mypy", "--config-file", config, "--cache-dir", cache, path)
    found = re.findall(r"user\.py:(\d+): (\w+): (.*)", said)
    assert found, said
    return [(int(line), level, re.sub(r"builtins\.|torch\._tensor\.", "", message)) for line, level, message in found]


def pyright(path: Path) -> Said:
    """The same of pyright in its strict mode."""
    config = path.with_name("pyrightconfig.json")
    config.write_text(json.dumps({"typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}))
    # The second brings its own node and is the same checker.
    name = next((name for name in ("basedpyright", "pyright") if importlib.util.find_spec(name)), None)
    if name is None:
        pytest.skip("pyright is not installed (pip install basedpyright)")
    said = output(name, "--outputjson", "--pythonpath", sys.executable, "--project", config, path)
    found = json.loads(said[said.index("{") :])["generalDiagnostics"]
    return [(one["range"]["start"]["line"] + 1, one["severity"], one["message"]) for one in found]


def output(module: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


@pytest.fixture(scope="module", params=[mypy, pyright], ids=["mypy", "pyright"])
def said(request, tmp_path_factory):
    """What a checker says of the user's lines and the wrong ones."""
    if request.param is mypy:
        pytest.importorskip("mypy")
    path = tmp_path_factory.mktemp("user") / "user.py"
    path.write_text(USER + "\n".join(WRONG) + "\n")
    return request.param(path)


def test_what_comes_back_has_the_type_of_what_went_in(said):
    # Of mypy: Revealed type is "T". Of pyright: Type of "expression" is "T".
    revealed = [re.search(r'ype (?:of ".*" )?is "(.*)"$', message) for _, level, message in said if level != "error"]
    assert [match[1] for match in revealed if match] == REVEALED


def test_a_users_lines_have_no_error_and_each_wrong_argument_has_one(said):
    first = USER.count("\n") + 1
    errors = {line for line, level, _ in said if level == "error"}
    assert errors == set(range(first, first + len(WRONG)))
