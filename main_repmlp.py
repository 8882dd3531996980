"""Trains, profiles (`--profile`), evaluates (`--eval`), times (`--throughput`) or counts (`--summary`) a network."""

if __name__ == "__main__":  # the imports below take seconds
    from utils.interrupt import end_on_interrupt

    end_on_interrupt()

import logging
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

from configs import changed_settings
from configs.command_line import parse
from engine import backends
from engine.evaluate import evaluate_checkpoint
from engine.profile import profile_training
from engine.run import Run
from engine.summary import summarize
from engine.throughput import measure_throughput
from engine.train import train
from models import list_models
from tasks import TASKS
from utils import cli, distributed
from utils.log import NAME, log_failure
from utils.memory import clear_about_memory
from utils.peers import clear_about_peers
from utils.signals import Stopped

EPILOG = f"""{cli.listing("architectures", list_models())}
  and every architecture of timm

examples:
  python main_repmlp.py --cfg configs/quickstart.yaml
  torchrun --nproc_per_node 8 main_repmlp.py --cfg configs/repmlpnet_t224_100ep.yaml --data-path IMAGENET --tag first
  python main_repmlp.py --eval --resume WEIGHTS.pth --data-path IMAGENET
  python main_repmlp.py --throughput --arch RepMLPNet-T224 --batch-size 16
  python main_repmlp.py --summary --arch RepMLPNet-T224
  python main_repmlp.py --profile --cfg configs/quickstart.yaml
  python main_repmlp.py --cfg configs/cityscapes_upernet_d256.yaml --data-path CITYSCAPES --pretrained WEIGHTS.pth
  python main_repmlp.py --data-path digits --arch RepMLPNet-Digits --opts TRAIN.EPOCHS 20 TRAIN.BASE_LR 0.01
Every key that --opts sets is explained in configs/defaults.py.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for."""
    options = parse(argv, description=__doc__, epilog=EPILOG)
    cfg = options.config
    backends.set_up(cfg)
    rank_info = distributed.init(options.local_rank, timedelta(minutes=cfg.DIST.TIMEOUT))
    modes = (
        (cfg.THROUGHPUT_MODE, measure_throughput),
        (cfg.SUMMARY_MODE, summarize),
        (cfg.EVAL_MODE, evaluate_checkpoint),
        (cfg.PROFILE_MODE, profile_training),
        (True, train),
    )
    mode = next(function for chosen, function in modes if chosen)
    try:
        with clear_about_peers(), clear_about_memory(cli.MORE_MEMORY):
            task = TASKS[cfg.TASK](cfg, rank_info)
            mode(Run(task, options.given, options.notices, partial(changed_settings, cfg=cfg)))
    except Exception as error:
        if not isinstance(error, Stopped):
            log_failure(logging.getLogger(NAME), error)
        raise
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    cli.run(main)
