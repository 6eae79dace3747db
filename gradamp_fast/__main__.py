"""`python -m gradamp_fast doctor` and `python -m gradamp_fast info [--json]`."""

from __future__ import annotations

import argparse
import json
import sys

from . import doctor


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status, 1 if the doctor found a problem."""
    parser = argparse.ArgumentParser(prog="python -m gradamp_fast")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor", help="check the installation; exit status 1 if something is wrong"
    )
    command = commands.add_parser("info", help="the facts that a bug report needs")
    command.add_argument("--json", action="store_true", help="as JSON")
    given = parser.parse_args(argv)
    if given.command == "doctor":
        return 0 if doctor.diagnose() else 1
    facts = doctor.info()
    if given.json:
        print(json.dumps(facts, indent=1))
    else:
        print(*doctor.build_lines(facts), *doctor.backend_lines(facts), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
