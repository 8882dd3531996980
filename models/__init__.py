"""Re-parameterised vision networks: the library, also installable alone as the package `repmlpnet`."""

from .build import canonical_name, create_model, default_image_size, list_models
from .dense import DenseBackbone, dense_backbone
from .locality import add_local_branches
from .mobilefacenet import MobileFaceNet, MobileFaceNetSpec
from .published import (
    create_RepMLPNet_B224,
    create_RepMLPNet_B256,
    create_RepMLPNet_D256,
    create_RepMLPNet_L256,
    create_RepMLPNet_T224,
    create_RepMLPNet_T256,
    fuse_bn,
    get_model,
    get_RepMLPNet_model,
    model_map,
)
from .pure_mlp import PureMLP, PureMLPSpec
from .repmlp_block import FFNBlock, GlobalPerceptron, RepMLPBlock
from .repmlp_resnet import RepMLP, RepMLPResNet, RepMLPResNetSpec
from .repmlpnet import SPECS, RepMLPNet, RepMLPNetSpec, RepMLPNetUnit
from .resmlp import ResMLP, ResMLPSpec
from .version import __version__ as __version__

__all__ = [
    "SPECS",
    "DenseBackbone",
    "FFNBlock",
    "GlobalPerceptron",
    "MobileFaceNet",
    "MobileFaceNetSpec",
    "PureMLP",
    "PureMLPSpec",
    "RepMLP",
    "RepMLPBlock",
    "RepMLPNet",
    "RepMLPNetSpec",
    "RepMLPNetUnit",
    "RepMLPResNet",
    "RepMLPResNetSpec",
    "ResMLP",
    "ResMLPSpec",
    "add_local_branches",
    "canonical_name",
    "create_RepMLPNet_B224",
    "create_RepMLPNet_B256",
    "create_RepMLPNet_D256",
    "create_RepMLPNet_L256",
    "create_RepMLPNet_T224",
    "create_RepMLPNet_T256",
    "create_model",
    "default_image_size",
    "dense_backbone",
    "fuse_bn",
    "get_RepMLPNet_model",
    "get_model",
    "list_models",
    "model_map",
]
