"""The command ``guard-ops``, which imports torch only when there is work for it.

A module of a package can be imported only after the package, and ``guard_ops`` imports torch, which
takes seconds. So the package is found here, its ``cli`` reads the command line, and only then does
the package run. ``--help``, ``--version`` and a mistyped word end before that.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys


def main() -> int:
    """The exit status; what the ``guard-ops`` script calls."""
    spec = importlib.util.find_spec("guard_ops")
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules["guard_ops"] = importlib.util.module_from_spec(spec)
    cli = importlib.import_module("guard_ops.cli")
    options = cli.parse()
    try:
        spec.loader.exec_module(package)
    except KeyboardInterrupt:  # torch takes seconds to import; nothing has begun yet
        return 130
    return int(cli.run(options))


if __name__ == "__main__":
    sys.exit(main())
