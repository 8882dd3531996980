"""Quick start on the embedded digits: train, evaluate, convert, check, evaluate the converted weights."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from utils import cli

RUN = Path("output/RepMLPNet-Digits/quickstart")
TRAINED, DEPLOY = RUN / "best_ckpt.pth", RUN / "deploy.pth"
CHECKED, DEPLOYED = RUN / "check.json", RUN / "deploy.json"
COMMANDS = (
    "main_repmlp.py --cfg configs/quickstart.yaml",
    f"main_repmlp.py --cfg configs/quickstart.yaml --eval --resume {TRAINED}",
    f"convert.py {TRAINED} {DEPLOY} -a RepMLPNet-Digits",
    f"test.py digits check {TRAINED} -a RepMLPNet-Digits --json {CHECKED}",
    f"test.py digits deploy {DEPLOY} -a RepMLPNet-Digits --json {DEPLOYED}",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the commands one after the other; returns the status of the first that fails."""
    cli.Parser(description=__doc__).parse_args(argv)
    for command in COMMANDS:
        print(f"\n$ python {command}", flush=True)
        status = subprocess.run([sys.executable, *shlex.split(command)], check=False).returncode
        if status:
            return status
    check, deploy = (json.loads(path.read_text()) for path in (CHECKED, DEPLOYED))
    rows = (
        ("top-1 before conversion", f"{check['top1']:.2f} %"),
        ("top-1 after conversion", f"{deploy['top1']:.2f} %"),
        ("largest relative logit difference", f"{check['difference']:.1e}"),
        ("training weights", TRAINED),
        ("deploy weights", DEPLOY),
        ("log, metrics, TensorBoard events", RUN),
    )
    print("\n" + "\n".join(f"{name:<36}{value}" for name, value in rows))
    return 0


if __name__ == "__main__":
    cli.run(main)
