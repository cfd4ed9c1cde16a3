"""The paper's tables and figures, measured again: ``python -m benchmarks.paper NAME``.

An experiment is a module in ``benchmarks/paper/experiments`` (found by itself; names with ``_`` in front are left out)
with an ``EXPERIMENT``::

    EXPERIMENT = Experiment(
        name="figure5",                 # what the command line calls it
        title="...",                    # heading in docs/reproduction.md
        paper="...",                    # what the paper did and says, with the figure's or table's number
        seeds={"smoke": 1, "small": 3, "paper": 3},   # how many, where --seeds says nothing
        units=units, claims=claims, figure=figure,
    )

- ``units(settings) -> list[Unit]``: the parts that are measured, saved and skipped one by one. ``Unit(key, run, data,
  seed, settings)``: ``key`` is stable and unique within a scale ("cifar10/esam/seed 0"); ``run() -> list[Row]`` gives
  rows of what was measured only (scale, unit, data, seed, settings and environment are added to each); ``settings``
  is a dict of all that the rows depend on besides the code (epochs, batch size, model, ...): a unit is skipped while
  rows with the same scale, key and settings are there. Timings put ``device_name(settings.device)`` among them.
- ``claims(rows) -> list[Claim]``: from all rows of one scale and device, which may be some of the units, and none:
  what was not measured has ``measured=None`` (the report says "not measured") and ``holds=None``. ``holds`` is None
  too where numbers stand side by side and nothing is claimed. ``Claim.rows`` are the rows it was computed from: the
  report takes device, data, seeds and commit from them.
- ``figure(rows, path)``: draws the PNG; ``plotting.py`` helps. Not called without rows.

``Settings`` has ``scale``, ``choose(smoke=, small=, paper=)``, ``seeds``, ``device``, ``data`` (``data_sets.Data``:
which data sets are there, and reading them), ``scratch`` (a folder for checkpoints within a unit) and ``check_time()``,
which leaves the unit when ``--minutes`` are over: to be called where a checkpoint was just saved. ``training.py``
trains with such checkpoints.

Rows lie in ``benchmarks/results/paper/<device>/NAME.json``, figures beside; ``python -m benchmarks.paper report``
writes docs/reproduction.md from them. The programs of ``examples/`` are used, by their own flat names.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = str(ROOT / "examples")
if EXAMPLES not in sys.path:
    sys.path.insert(0, EXAMPLES)
