"""``python -m nnssl_ext.nnunet_plugin.run nnUNetv2_train ...``: a stock command with our classes, without start-up file.

For installations whose start-up files Python ignores (``pip install --target``, ``PYTHONPATH``, ``python -S``). Spawned
workers import this module as their main module, and `install` then runs in them, too.
"""

import sys
from importlib.metadata import entry_points

from nnssl_ext.errors import unknown_name
from nnssl_ext.nnunet_plugin.startup import install

install()


def main() -> int | None:
    """Run the console command named by the first argument with the remaining ones."""
    commands = {command.name: command for command in entry_points(group="console_scripts")}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in commands:
        known = [command for command in commands if command.startswith("nnUNetv2_")]
        sys.exit(f"error: {unknown_name('command', name, known)}")
    sys.argv = sys.argv[1:]
    result: int | None = commands[name].load()()
    return result


if __name__ == "__main__":
    sys.exit(main())
