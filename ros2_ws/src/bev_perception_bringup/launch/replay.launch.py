"""A bag of tools/nuscenes_to_bag.py, the node and RViz.

ros2 launch bev_perception_bringup replay.launch.py bag:=/path weights:=/path rviz:=true
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess, IncludeLaunchDescription, TimerAction
from launch.conditions import IfCondition
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare

BRINGUP = FindPackageShare("bev_perception_bringup")
ARGUMENTS = {
    "bag": ("", "folder of the bag"),
    "weights": ("", "weights.safetensors or a run's folder"),
    "rate": ("1.0", "2.0 plays twice as fast"),
    "start_delay": ("15.0", "seconds for the node to load and warm up before the bag begins"),
    "rviz": ("true", "whether to start RViz"),
}


def generate_launch_description() -> LaunchDescription:
    """Arguments, node, bag, RViz."""
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in ARGUMENTS.items()
    ]
    bag = LaunchConfiguration("bag")
    node = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(PathJoinSubstitution([BRINGUP, "launch", "bev_perception.launch.py"])),
        launch_arguments={
            "weights": LaunchConfiguration("weights"),
            "calibration_file": PathJoinSubstitution([bag, "calibration.yaml"]),
            "sweep_trigger": "true",
            "use_sim_time": "true",
        }.items(),
    )
    command = ["ros2", "bag", "play", bag, "--clock", "50", "--loop", "--rate", LaunchConfiguration("rate")]
    play = ExecuteProcess(cmd=command, output="screen")
    rviz = Node(
        package="rviz2",
        executable="rviz2",
        arguments=["-d", PathJoinSubstitution([BRINGUP, "rviz", "bev_perception.rviz"])],
        parameters=[{"use_sim_time": True}],
        condition=IfCondition(LaunchConfiguration("rviz")),
    )
    delayed = TimerAction(period=LaunchConfiguration("start_delay"), actions=[play])
    return LaunchDescription([*arguments, node, delayed, rviz])
