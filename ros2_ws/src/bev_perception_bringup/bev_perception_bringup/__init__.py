"""Launch files, parameters and layouts of bev_perception; no code."""
