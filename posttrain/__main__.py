"""Runs the command line: ``python -m posttrain recipe.yaml`` is ``posttrain train recipe.yaml``."""

import sys

from posttrain.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
