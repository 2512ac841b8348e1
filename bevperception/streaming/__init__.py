"""Turn a vehicle's messages into boxes and maps, without ROS; the ROS 2 node calls this.

Times are integer nanoseconds as ROS stamps have them where they come from a message, and float seconds of
a monotonic clock where they say when something arrived here.
"""
