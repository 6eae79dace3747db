"""`python -m gradamp_fast doctor [--full]` and `python -m gradamp_fast info [--json]`."""

from __future__ import annotations

import argparse
import json
import os
import sys

from . import doctor


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status, 1 if the doctor found a problem."""
    parser = argparse.ArgumentParser(prog="python -m gradamp_fast")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "doctor", help="check the installation; exit status 1 if something is wrong"
    )
    command.add_argument("--full", action="store_true", help="with build and environment")
    command = commands.add_parser("info", help="the facts that a bug report needs")
    command.add_argument("--json", action="store_true", help="as JSON, with the environment")
    given = parser.parse_args(argv)
    if given.command == "doctor":
        text, healthy = doctor.diagnose(given.full)
        _show(text)
        return 0 if healthy else 1
    facts = doctor.info(environment=given.json)
    if given.json:
        _show(json.dumps(facts, indent=1))
    else:
        _show("\n".join([*doctor.build_lines(facts), *doctor.backend_lines(facts)]))
    return 0


def _show(text: str) -> None:
    """Prints; a reader that has seen enough, such as `head -1`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
