"""`python -m rollout.server.launch_router '{"worker_urls": [...], ...}'`: sglang-router itself.

Not for people (see rollout.server.router). The router's own command takes its key as an argument.
"""

import json
import os
import sys

from rollout.process import follow_launcher

API_KEY = "DRIVETRAIN_ROUTER_API_KEY"
"""Environment variable: what requests carry, to the router and from it to the engines."""


def main() -> None:
    """Run the router until it is told to end."""
    follow_launcher()
    from sglang_router.launch_router import launch_router
    from sglang_router.router_args import RouterArgs

    launch_router(RouterArgs(**json.loads(sys.argv[1]), api_key=os.environ[API_KEY]))  # pyright: ignore


if __name__ == "__main__":
    main()
