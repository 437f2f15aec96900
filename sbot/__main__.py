"""``python -m sbot`` and the command ``sbot``."""

from __future__ import annotations

from .cli import commands


def main() -> None:
    """Run the command line; exits with 0, 1 (bad input), 2 (not converged) or 130 (interrupted)."""
    commands(prog_name="sbot")


if __name__ == "__main__":
    main()
