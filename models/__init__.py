"""Re-parameterised vision networks: the library, also installable alone as the package `repmlpnet`."""

__version__ = "0.1.0"

from .build import create_model, default_image_size, list_models
from .repmlpnet import SPECS, RepMLPBlock, RepMLPNet, RepMLPNetSpec

__all__ = [
    "SPECS",
    "RepMLPBlock",
    "RepMLPNet",
    "RepMLPNetSpec",
    "create_model",
    "default_image_size",
    "list_models",
]
