"""From a vehicle's messages to boxes and maps, without ROS: what the ROS 2 node calls.

Times are integer nanoseconds as ROS stamps have them where they come from a message, and float seconds of
a monotonic clock where they say when something arrived here.
"""
