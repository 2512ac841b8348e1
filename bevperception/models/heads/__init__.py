"""Heads: detection, segmentation."""
