"""Start the node: ``ros2 run bev_perception node`` or ``python -m bev_perception.main``."""

from __future__ import annotations

import sys

from bevperception.errors import USAGE_EXIT_CODE, BevError, importing

with importing():
    import rclpy
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
    from rclpy.lifecycle import TransitionCallbackReturn

    from bev_perception.node import BevPerceptionNode


def main(args: list[str] | None = None) -> int:
    """Run until interrupted.

    Returns:
        the process's exit code.
    """
    rclpy.init(args=args)
    try:
        node = BevPerceptionNode()
    except BevError as error:
        print(f"error: {error}", file=sys.stderr)
        rclpy.try_shutdown()
        return USAGE_EXIT_CODE
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        if node.declare_parameter("autostart", True).value:
            for step in (node.trigger_configure, node.trigger_activate):
                if step() != TransitionCallbackReturn.SUCCESS:
                    print(f"error: {node.problem}", file=sys.stderr)
                    return USAGE_EXIT_CODE
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        return 0
    finally:
        node.close()
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
