"""The published module: its names and MMPretrain's, and the equivalence of Locality Injection when it is run.

from repmlpnet import RepMLPBlock, RepMLPNet, create_RepMLPNet_B224, get_model, inference_model

In a clone, this file takes the place of the package `repmlpnet`, which `pip install .` makes of the folder `models`. It
has the same names, plus `inference_model`. Submodules are imported from `models`: `models.reparam`.
"""

if __name__ == "__main__":  # the imports below take seconds
    from utils.interrupt import end_on_interrupt

    end_on_interrupt()

from collections.abc import Sequence

import torch

import models
from models import *  # noqa: F403
from models import create_model, list_models
from models.build import canonical_name, default_image_size
from models.published import PUBLISHED
from models.reparam import ALGEBRA_TOLERANCE, injection_error
from tasks.prediction import inference_model
from utils import cli

__all__ = ["inference_model"]
__all__ += models.__all__


def parser() -> cli.Parser:
    """Describes the command line."""
    text = "Compares the outputs of networks before and after Locality Injection, in float64, with random statistics."
    architectures = cli.listing("architectures", list_models())
    result = cli.Parser(description=text, epilog=architectures, argument_default=None)
    result.add_argument("archs", metavar="ARCH", nargs="*", default=PUBLISHED, help="architecture; all published ones")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the difference for each network; returns 1 if one is not equivalent."""
    failed = False
    for arch in map(canonical_name, parser().parse_args(argv).archs):
        torch.manual_seed(0)
        difference = injection_error(create_model(arch), torch.randn(1, 3, *default_image_size(arch)), randomize=True)
        equivalent = difference <= ALGEBRA_TOLERANCE
        failed |= not equivalent
        print(f"{arch}: largest relative logit difference {difference:.1e}, {'' if equivalent else 'NOT '}equivalent")
    return int(failed)


if __name__ == "__main__":
    cli.run(main)
