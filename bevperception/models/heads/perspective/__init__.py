"""The perspective head of BEVFormer v2: dense 3D detection in every camera image (DD3D's form)."""
