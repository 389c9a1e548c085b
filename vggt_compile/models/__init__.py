"""VGGT and π³ written here: any grid, one graph without shims, and the released checkpoints' parameter names."""

from vggt_compile.models.camera import CameraConfig
from vggt_compile.models.checkpoint import CheckpointError, Loaded, load_checkpoint
from vggt_compile.models.dpt import DPTConfig
from vggt_compile.models.encoder import ViTConfig
from vggt_compile.models.pi3 import Pi3, Pi3Config
from vggt_compile.models.prediction import Prediction, prediction
from vggt_compile.models.presets import pi3, vggt
from vggt_compile.models.pretrained import available, pretrained
from vggt_compile.models.vggt import VGGT, VGGTConfig

__all__ = [
    "VGGT",
    "CameraConfig",
    "CheckpointError",
    "DPTConfig",
    "Loaded",
    "Pi3",
    "Pi3Config",
    "Prediction",
    "VGGTConfig",
    "ViTConfig",
    "available",
    "load_checkpoint",
    "pi3",
    "prediction",
    "pretrained",
    "vggt",
]
