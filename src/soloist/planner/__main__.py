"""`python -m soloist.planner validate | calibrate`: the planner's own commands without the rest of the program."""

from __future__ import annotations

import sys

from soloist.errors import SoloistError
from soloist.planner.checks import run_refit, run_validate


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    verb, rest = (arguments or [""])[0], arguments[1:]
    folder = next((word for word in rest if not word.startswith("-")), None)
    try:
        if verb == "validate":
            return run_validate(folder, as_json="--json" in rest, cross="--cross" in rest)
        if verb == "calibrate":
            return run_refit()
    except SoloistError as error:
        print(error, file=sys.stderr)
        return 2
    print("usage: python -m soloist.planner validate [DIR] [--json] [--cross] | calibrate", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
