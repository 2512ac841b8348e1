"""rosbag2 folders without ROS, through rosbags: writing scenes, injecting faults, evaluating recordings."""
