"""Bird's-eye-view perception from car cameras in plain PyTorch.

Images, calibration and ego pose go in; 3D boxes and a bird's-eye-view segmentation come out.
Start with :class:`bevperception.models.bevformer.BEVFormer` and
:class:`bevperception.structures.CameraFrames`.
"""

__version__ = "0.2.0"
