"""Reading nuScenes-format data with the unmodified devkit."""
