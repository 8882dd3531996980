"""What weights are by their names and shapes: which architecture, for which images and classes, in which form."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .build import OWN, classifier_name, create_model, default_image_size, own_spec


class Identity(NamedTuple):
    """What weights are: of which architecture, for what images and classes, in which form."""

    arch: str
    image_size: tuple[int, int]
    num_classes: int
    form: str | None

    def __str__(self) -> str:
        height, width = self.image_size
        form = f"{self.form or ''} weights".lstrip()
        return f"{form} of {self.arch} with {self.num_classes} classes at {height}x{width}"


def fitting_architectures(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Returns our architectures of which these are the weights, in either form and for any number of classes.

    Where none fits at the image size that it is made for, those that fit at another size are returned.
    """
    return [identity.arch for identity in identify(state_dict)]


def identify(state_dict: Mapping[str, Tensor]) -> list[Identity]:
    """Returns what weights may be by their names and shapes; as `fitting_architectures`, with sizes and classes."""
    form, exact, resized = form_of(state_dict), list[Identity](), list[Identity]()
    given = {name: tensor.shape for name, tensor in state_dict.items()}
    for name in OWN:
        deploy, head = is_deploy(name, form), f"{classifier_name(name)}."
        own = _shapes(name, deploy)
        if own.keys() != given.keys():
            continue
        made = OWN[name].network.built_for(state_dict, own_spec(name, {}), default_image_size(name))
        classes = given[f"{head}weight"][:1].numel()
        if _same_but(head, own, given):
            exact.append(Identity(name, default_image_size(name), classes, form))
        elif _same_but(head, _shapes(name, deploy, **made), given):
            resized.append(Identity(name, made["img_size"], classes, form))
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
    """Says whether weights of a form belong into the deploy structure of an architecture, if it has one.

    Those of no form do: a structure without anything to inject is the deploy structure.
    """
    return arch in OWN and form != "train"


def form_of(names: Iterable[str]) -> str | None:
    """Returns the form that names alone tell; an injected layer that never had a BatchNorm looks like any other."""
    if any(name.endswith("fc3.bias") for name in names):
        return "deploy"
    return "train" if any(".fc3_bn." in name or ".repconv" in name for name in names) else None
