"""nuScenes detection metrics and BEV segmentation IoU."""
