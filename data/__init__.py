"""From stored images to batches on the device.

`open_source` opens the images of a data set in `DATASETS`; `train_transform` and `eval_transform` turn each into a
uint8 tensor, `segmentation_train_transform` and `segmentation_eval_transform` together with its mask (`MaskedDataset`);
`build_train_loader` and `build_eval_loader` shard them over the processes in batches; `build_rand_augment`, `Normalize`
and `build_batch_augmentation` finish a batch on the device. The builders take the frozen section of the configuration
that describes what they build, DATA or AUG.

Every random number is a function of the seed, the epoch and the image (or the step), so that workers, processes and a
resumed run do not change it.
"""

from .batch_augmentation import (
    ERASING_MODES,
    MIXUP_MODES,
    BatchAugmentation,
    BatchTransform,
    build_batch_augmentation,
)
from .batch_randaugment import AUGMENT_DEVICES, BatchRandAugment, build_rand_augment, describe_place
from .cityscapes import CITYSCAPES, CityscapesSource
from .datasets import (
    DATASETS,
    DatasetSpec,
    Statistics,
    is_known,
    known_names,
    open_source,
    resolve_name,
    spec_of,
)
from .decode import JPEG_DECODERS, Decoder, build_decoder
from .digits import DigitsSource
from .folders import FolderSource
from .formats import FORMATS, holds_a_part
from .lists import ListSource
from .loaders import Batch, BatchLoader, Sample, TransformedDataset, build_eval_loader, build_train_loader
from .pairs import Pairs, draw_pairs, read_pairs
from .pixels import DecodedImage
from .randaugment import is_rand_augment
from .samplers import SAMPLINGS, EvalSampler, SampleKey, TrainSampler
from .segmentation import MaskedDataset, segmentation_eval_transform, segmentation_train_transform
from .shapes import ShapesSource
from .sources import DIGITS, IGNORED, SHAPES, EncodedSource, ImageSource, Source
from .tars import TarSource
from .transforms import (
    INTERPOLATIONS,
    POLICIES,
    PRESETS,
    WITHOUT_CROP,
    WITHOUT_FLIP,
    Normalize,
    eval_transform,
    is_auto_augment_policy,
    train_transform,
)
from .zipped import CACHE_MODES, ZipSource

__all__ = [
    "AUGMENT_DEVICES",
    "CACHE_MODES",
    "CITYSCAPES",
    "DATASETS",
    "DIGITS",
    "ERASING_MODES",
    "FORMATS",
    "IGNORED",
    "INTERPOLATIONS",
    "JPEG_DECODERS",
    "MIXUP_MODES",
    "POLICIES",
    "PRESETS",
    "SAMPLINGS",
    "SHAPES",
    "WITHOUT_CROP",
    "WITHOUT_FLIP",
    "Batch",
    "BatchAugmentation",
    "BatchLoader",
    "BatchRandAugment",
    "BatchTransform",
    "CityscapesSource",
    "DatasetSpec",
    "DecodedImage",
    "Decoder",
    "DigitsSource",
    "EncodedSource",
    "EvalSampler",
    "FolderSource",
    "ImageSource",
    "ListSource",
    "MaskedDataset",
    "Normalize",
    "Pairs",
    "Sample",
    "SampleKey",
    "ShapesSource",
    "Source",
    "Statistics",
    "TarSource",
    "TrainSampler",
    "TransformedDataset",
    "ZipSource",
    "build_batch_augmentation",
    "build_decoder",
    "build_eval_loader",
    "build_rand_augment",
    "build_train_loader",
    "describe_place",
    "draw_pairs",
    "eval_transform",
    "holds_a_part",
    "is_auto_augment_policy",
    "is_known",
    "is_rand_augment",
    "known_names",
    "open_source",
    "read_pairs",
    "resolve_name",
    "segmentation_eval_transform",
    "segmentation_train_transform",
    "spec_of",
    "train_transform",
]
