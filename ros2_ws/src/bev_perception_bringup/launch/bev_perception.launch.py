"""The perception node on a vehicle's topics.

    ros2 launch bev_perception_bringup bev_perception.launch.py weights:=/path calibration_file:=/path

Cameras are expected at SENSORS/cam_front/image/compressed and SENSORS/cam_front/camera_info, and so on.
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

CAMERAS = ("cam_front", "cam_front_right", "cam_front_left", "cam_back", "cam_back_left", "cam_back_right")
BRINGUP = FindPackageShare("bev_perception_bringup")
ARGUMENTS = {
    "weights": ("", "weights.safetensors or a run's folder"),
    "calibration_file": ("", "YAML file with the cameras' poses; empty relies on TF"),
    "params_file": (PathJoinSubstitution([BRINGUP, "config", "bev_perception.yaml"]), "parameters"),
    "sensors": ("/sensors", "namespace of the cameras"),
    "odometry": ("/odometry", "nav_msgs/Odometry topic"),
    "sweep_trigger": ("false", "whether SENSORS/sweep opens image sets"),
    "use_sim_time": ("false", "time from /clock"),
    "fastdds_profile": (
        PathJoinSubstitution([FindPackageShare("bev_perception"), "config", "fastdds.xml"]),
        "Fast DDS profile with room for images; other middlewares ignore it",
    ),
    "log_level": ("info", "debug, info, warn or error"),
}


def remappings() -> list[tuple]:
    """From the node's private names to the vehicle's topics."""
    sensors = LaunchConfiguration("sensors")
    pairs = [("~/input/odometry", LaunchConfiguration("odometry")), ("~/input/sweep", [sensors, "/sweep"])]
    for camera in CAMERAS:
        for topic in ("image", "image/compressed", "camera_info"):
            pairs.append((f"~/input/{camera}/{topic}", [sensors, f"/{camera}/{topic}"]))
    return pairs


def generate_launch_description() -> LaunchDescription:
    """Arguments, environment, node."""
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in ARGUMENTS.items()
    ]
    typed = {"sweep_trigger": bool, "use_sim_time": bool, "weights": str, "calibration_file": str}
    values = {
        name: ParameterValue(LaunchConfiguration(name), value_type=kind) for name, kind in typed.items()
    }
    node = Node(
        package="bev_perception",
        executable="node",
        name="bev_perception",
        output="screen",
        parameters=[LaunchConfiguration("params_file"), values],
        remappings=remappings(),
        arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
    )
    profile = SetEnvironmentVariable("FASTDDS_DEFAULT_PROFILES_FILE", LaunchConfiguration("fastdds_profile"))
    return LaunchDescription([*arguments, profile, node])
