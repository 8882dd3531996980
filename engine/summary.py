"""The size of a network: parameters and multiply-adds of both structures, by part, beside the published figures."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from models.counts import OTHERS, Counts, count_parts
from models.reparam import is_reparameterizable, to_deploy
from models.reported import PAPERS, REPORTED, Reported, agrees, count_reported
from utils.text import table

from .run import Run

CONVENTION = "multiply-adds of one image, in convolutions and matrix products; element-wise operations are not counted"
Parts = Mapping[tuple[str, str], Counts]
PART_COLUMNS = (
    ("part", "part", "s"),
    ("parameters", "parameters", ",d"),
    ("deploy", "deploy_parameters", ",d"),
    ("multiply-adds", "multiply_adds", ",d"),
    ("deploy", "deploy_multiply_adds", ",d"),
)
REPORTED_COLUMNS = (
    ("network", "name", "s"),
    ("source", "source", "s"),
    ("training M", "training", ".3f"),
    ("deploy M", "deploy", ".3f"),
    ("published M", "parameters", "s"),
    ("deploy G", "operations", ".3f"),
    ("published G", "multiply_adds", "s"),
    ("branches add", "added", ",d"),
    ("published", "published_added", "s"),
    ("published %", "top1", "s"),
    ("", "equal", "s"),
)


def summarize(run: Run) -> None:
    """Prints the size of the configured network, for images of the size it is tested with; reads no images."""
    if run.rank_info.rank:
        return
    task = run.task
    size = task.test_size(task.train_size) or task.train_size
    outputs = task.num_outputs()
    with torch.device("meta"):
        network = task.build_network(outputs).eval()
    print(f"{task.arch}, {outputs} outputs, images of {size[0]}x{size[1]}; {CONVENTION}\n")
    print(part_table(network, (1, task.channels, *size)))
    published = [row for row in REPORTED if row.arch == task.arch]
    if published:
        print(f"\nour counts beside the published ones\n\n{reported_table(published)}")


def part_table(network: nn.Module, shape: tuple[int, ...]) -> str:
    """Returns the table of a network's parts, in the structure that it has and, where there is one, to deploy.

    Args:
        network: in its training structure.
        shape: of the input, (N, in_chans, H, W).
    """
    training = count_parts(network, shape)
    if not is_reparameterizable(network):
        return table(_part_rows(training, training), [c for c in PART_COLUMNS if not c[1].startswith("deploy")])
    return table(_part_rows(training, count_parts(to_deploy(network), shape)), PART_COLUMNS)


def _part_rows(training: Parts, deploy: Parts) -> list[dict[str, Any]]:
    """Returns a row for each place, below it one for each kind where it has several, and one for the whole."""

    def row(part: str, keys: Iterable[tuple[str, str]]) -> dict[str, Any]:
        keys = list(keys)
        before, after = (sum((counts[k] for k in keys if k in counts), Counts()) for counts in (training, deploy))
        return {
            "part": part,
            "parameters": before.parameters,
            "deploy_parameters": after.parameters,
            "multiply_adds": before.multiply_adds,
            "deploy_multiply_adds": after.multiply_adds,
        }

    rows = []
    for place in dict.fromkeys(place for place, _ in training):
        kinds = [key for key in training if key[0] == place]
        rows.append(row(place, kinds))
        if {kind for _, kind in kinds} - {OTHERS} and len(kinds) > 1:
            rows += [row(f"  {kind}", [(place, kind)]) for _, kind in kinds]
    return [*rows, row("all", training)]


def reported_table(rows: Iterable[Reported]) -> str:
    """Returns our counts beside the published ones, and below them why some differ.

    Equal means that ours, rounded, are the published ones: parameters of the training structure, multiply-adds of the
    deploy structure.

    Segmentation networks are left out, with a note, where segmentation-models-pytorch is not installed.
    """
    lines: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}  # what each is for
    for row in rows:
        try:
            ours = count_reported(row)
        except ValueError as error:
            notes.setdefault(f"not counted, {error}", []).append(f"{row.name} ({row.source})")
            continue
        parameters, operations = ours.training.parameters / 1e6, ours.deploy.multiply_adds / 1e9
        equal = agrees(parameters, row.parameters) and agrees(operations, row.multiply_adds)
        equal = equal and (ours.added is None or str(ours.added) == row.added)
        lines.append(
            {"name": row.name, "source": row.source, "training": parameters, "deploy": ours.deploy.parameters / 1e6}
            | {"operations": operations, "added": ours.added, "equal": _verdict(row, equal)}
            | {key: getattr(row, key) or None for key in ("parameters", "multiply_adds", "top1")}
            | {"published_added": f"{int(row.added):,}" if row.added else None}
        )
        if row.note:
            notes.setdefault(row.note, []).append(f"{row.name} ({row.source})")
    explained = [f"{'; '.join(names)}: {note}" for note, names in notes.items()]
    return "\n".join([table(lines, REPORTED_COLUMNS), "", *explained, PAPERS])


def _verdict(row: Reported, equal: bool) -> str:
    if not (row.parameters or row.multiply_adds or row.added):
        return ""
    return "equal" if equal else "differs"
