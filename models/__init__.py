"""Re-parameterised vision networks: the library, also installable alone as the package `repmlpnet`."""

__version__ = "0.1.0"

from .build import canonical_name, create_model, default_image_size, list_models
from .dense import DenseBackbone, dense_backbone
from .locality import add_local_branches
from .mobilefacenet import MobileFaceNet, MobileFaceNetSpec
from .repmlp_resnet import RepMLP, RepMLPResNet, RepMLPResNetSpec
from .repmlpnet import SPECS, RepMLPBlock, RepMLPNet, RepMLPNetSpec
from .resmlp import ResMLP, ResMLPSpec

__all__ = [
    "SPECS",
    "DenseBackbone",
    "MobileFaceNet",
    "MobileFaceNetSpec",
    "RepMLP",
    "RepMLPBlock",
    "RepMLPNet",
    "RepMLPNetSpec",
    "RepMLPResNet",
    "RepMLPResNetSpec",
    "ResMLP",
    "ResMLPSpec",
    "add_local_branches",
    "canonical_name",
    "create_model",
    "default_image_size",
    "dense_backbone",
    "list_models",
]
