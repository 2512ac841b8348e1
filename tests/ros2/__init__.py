"""Tests with real ROS 2 processes over Fast DDS; skipped where rclpy is not installed (see make ros-test)."""
