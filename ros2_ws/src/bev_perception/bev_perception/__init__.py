"""The ROS 2 node of bevperception: six cameras in, boxes and BEV segmentation out."""
