"""From stored images to batches on the device.

`open_source` finds the images of a data set in `DATASETS`; `train_transform` and `eval_transform` turn each into a
uint8 tensor; `build_train_loader` and `build_eval_loader` shard them over the processes in batches; `Normalize` and
`build_mixing` finish a batch on the device. Every random draw is a function of the seed, the epoch and the image (or
the step), so that workers, processes and a resumed run do not change what is drawn.
"""

from .datasets import DATASETS, DatasetSpec, open_source, resolve_name
from .loaders import Batch, Sample, TransformedDataset, build_eval_loader, build_train_loader
from .mixing import Mixing, build_mixing
from .pairs import Pairs, draw_pairs, read_pairs
from .samplers import Draw, EvalSampler, TrainSampler
from .shapes import ShapesSource
from .sources import DIGITS, SHAPES, CifarSource, DigitsSource, FolderSource, ImageSource
from .transforms import PRESETS, Normalize, eval_transform, train_transform
from .zipped import ZipSource

__all__ = [
    "DATASETS",
    "DIGITS",
    "PRESETS",
    "SHAPES",
    "Batch",
    "CifarSource",
    "DatasetSpec",
    "DigitsSource",
    "Draw",
    "EvalSampler",
    "FolderSource",
    "ImageSource",
    "Mixing",
    "Normalize",
    "Pairs",
    "Sample",
    "ShapesSource",
    "TrainSampler",
    "TransformedDataset",
    "ZipSource",
    "build_eval_loader",
    "build_mixing",
    "build_train_loader",
    "draw_pairs",
    "eval_transform",
    "open_source",
    "read_pairs",
    "resolve_name",
    "train_transform",
]
