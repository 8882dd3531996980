"""What weights are by their names and shapes: their architecture, image size, number of classes and form."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .build import REGISTRY, changeable, classifier_name, create_model, default_image_size, own_spec


class Identity(NamedTuple):
    """What weights are: their architecture, image size (height, width), number of classes and form.

    `insert_bn` tells whether those of form "train" are converted weights with a BatchNorm inserted after every FC3.
    """

    arch: str
    image_size: tuple[int, int]
    num_classes: int
    form: str | None
    insert_bn: bool = False

    def __str__(self) -> str:
        height, width = self.image_size
        form = f"{self.form or ''} weights".lstrip() + " with inserted BatchNorms" * self.insert_bn
        return f"{form} of {self.arch} with {self.num_classes} classes at {height}x{width}"


def fitting_architectures(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Returns our architectures of which these are the weights, in either form and for any number of classes.

    Where none fits at the image size that it is made for, those that fit at another size are returned.
    """
    return [identity.arch for identity in identify(state_dict)]


def identify(state_dict: Mapping[str, Tensor]) -> list[Identity]:
    """Returns what weights may be by names and shapes, in the order and by the rule of `fitting_architectures`."""
    form, exact, resized = form_of(state_dict), list[Identity](), list[Identity]()
    given = {name: tensor.shape for name, tensor in state_dict.items()}
    structure = structure_of(state_dict)
    for name in REGISTRY:
        if not structure.keys() <= {*changeable(name)}:
            continue
        deploy, head = is_deploy(name, form), f"{classifier_name(name)}."
        own = _shapes(name, deploy, **structure)
        if own.keys() != given.keys():
            continue
        made = REGISTRY[name].network.built_for(state_dict, own_spec(name, {}), default_image_size(name))
        classes = given[f"{head}weight"][:1].numel()
        if _same_but(head, own, given):
            exact.append(Identity(name, default_image_size(name), classes, form, bool(structure)))
        elif _same_but(head, _shapes(name, deploy, **made, **structure), given):
            resized.append(Identity(name, made["img_size"], classes, form, bool(structure)))
    return exact or resized


@cache
def _shapes(name: str, deploy: bool, **options: Any) -> dict[str, torch.Size]:
    """Returns the shapes of an architecture's weights by name, empty where it can't be built with these options."""
    try:
        with torch.device("meta"):
            model = create_model(name, deploy=deploy, **options)
    except ValueError:
        return {}
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _same_but(prefix: str, own: Mapping[str, torch.Size], given: Mapping[str, torch.Size]) -> bool:
    """Returns whether weights have the same names and shapes, but for the shapes below a prefix."""
    return own.keys() == given.keys() and all(own[k] == v for k, v in given.items() if not k.startswith(prefix))


def is_deploy(arch: str, form: str | None) -> bool:
    """Returns whether weights of a form belong to the deploy structure of an architecture, if it has one.

    Those of no form do: a structure without anything to inject is the deploy structure.
    """
    return arch in REGISTRY and form != "train"


def form_of(names: Iterable[str]) -> str | None:
    """Returns the form that names alone show; None where they show none, as of a layer that never had a BatchNorm.

    The stem of a RepMLP-ResNet shows it even without RepMLP.
    """
    names = list(names)
    if any(part in name for name in names for part in (".fc3_bn.", ".repconv", "stage0.0.bn.")):
        return "train"
    return "deploy" if any(name.endswith(("fc3.bias", "stage0.0.conv.bias")) for name in names) else None


def inserted_bn_names(names: Iterable[str]) -> list[str]:
    """Returns the names of inserted BatchNorms: those after an FC3 that, being converted, has a bias."""
    names = list(names)
    converted = any(name.endswith("fc3.bias") for name in names)
    return [name for name in names if converted and ".fc3_bn." in name]


def structure_of(names: Iterable[str]) -> dict[str, Any]:
    """Returns the parts of a structure that names alone show, where they differ from every architecture's own."""
    return {"insert_bn": True} if inserted_bn_names(names) else {}


def remedy(file: Identity, network: Identity) -> str:
    """Returns what to change so that the weights of a file fit, as the end of a message; empty where nothing helps."""
    if file.arch != network.arch:
        return f": set MODEL.ARCH to {file.arch}"
    if file.form == network.form and file.insert_bn != network.insert_bn:
        return ": set MODEL.INSERT_BN to True" if file.insert_bn else ": convert them first (convert.py)"
    if file.form != network.form:
        converted = "give the training weights that they were converted from"
        return f": {converted if file.form == 'deploy' else 'convert them first (convert.py)'}"
    if file.image_size != network.image_size:
        height, width = file.image_size
        return f": set DATA.IMG_SIZE to {height if height == width else f'{height},{width}'}"
    if file.num_classes != network.num_classes:
        return f": give data of {file.num_classes} classes, or set MODEL.NUM_CLASSES to {file.num_classes}"
    return ""
