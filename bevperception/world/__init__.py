"""Make a procedural world in nuScenes' format: roads, traffic, pictures, tables, maps, CAN-bus messages.

:func:`make_world` writes a data root that the unmodified devkit, and so everything in this project, reads.
"""

from bevperception.world.settings import WorldConfig
from bevperception.world.writer import make_world

__all__ = ["WorldConfig", "make_world"]
