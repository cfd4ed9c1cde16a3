"""``python -m esam_kernels``: the commands of the package."""

from __future__ import annotations

import argparse
import sys

from esam_kernels import __version__, doctor

EPILOG = """
In code:
  from esam_kernels import SAM, cross_entropy
  optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.1, ascent_share=0.25, model=model)
  loss = optimizer.step(losses, inputs, targets)   # losses(inputs, targets): one loss for each sample

In a clone of the repository: make train (a demonstration), make test, make docs (all pages).
ESAM_KERNELS_LOG=debug shows which backend serves what.
"""


def main() -> int:
    """Run the command that was asked for, and return its exit code; without one, say which there are."""
    parser = argparse.ArgumentParser(
        prog="python -m esam_kernels",
        description=f"esam_kernels {__version__}: sharpness-aware training for PyTorch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"esam_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="command")
    commands.add_parser("doctor", help="versions, devices, backends, and a self-check of each against the reference")
    if parser.parse_args().command == "doctor":
        return doctor.main()
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
