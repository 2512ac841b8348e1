"""Image backbones, one file a family."""
