"""``python -m esam_kernels doctor``."""

from __future__ import annotations

import argparse
import sys

from esam_kernels import doctor


def main() -> int:
    """Run the command that was asked for, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m esam_kernels")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, devices, backends, and a self-check of each against the reference")
    parser.parse_args()
    return doctor.main()


if __name__ == "__main__":
    sys.exit(main())
