"""`python -m rollout.server.launch --model-path ... `: SGLang's own server, on a CPU as well.

Not for people (see rollout.server.engine). SGLang spawns its worker processes, and a spawned
process imports this module again before anything of SGLang: that is why the stand-ins are
installed, and the parent is followed, when this module is imported.
"""

import os
import sys

from rollout.process import die_with_parent, follow_launcher
from rollout.server import stubs

API_KEY = "DRIVETRAIN_ENGINE_API_KEY"
"""Environment variable: a command line can be read by every user of the machine."""

if __name__ == "__main__":
    follow_launcher()
elif __name__ == "__mp_main__":
    die_with_parent()

stubs.install()


def main() -> None:
    """Run the server until it is told to end."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    from rollout.server import cpu_plugin

    load_plugins()
    cpu_plugin.check_hooks()
    arguments = sys.argv[1:]
    if key := os.environ.get(API_KEY):
        arguments += ["--api-key", key]
    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
