"""The schema: every key of a configuration with its meaning, unit, allowed values and default.

Numbers stand here as the user writes them; `configs.derive` turns them into what a run uses.
"""

from yacs.config import CfgNode

from .values import BOOLEAN, INTEGER, INTEGERS, NUMBER_PAIR, PATH, SIZE, TEXT, Kind, optional

_C = CfgNode()

# YAML files to start from, in this order, each relative to the file that names it; later ones win, the file itself
# wins over all. Only a file can have it. It is spent on loading, so a loaded configuration stands by itself.
_C.BASE = [""]

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
_C.DATA = CfgNode()
# Training images per process and step; at least 1. The global batch is this x processes x ACCUMULATION_STEPS.
_C.DATA.BATCH_SIZE = 128
# Folder of the data set; the words `digits` and `shapes` stand for data sets that come with the project.
_C.DATA.DATA_PATH = "/path/to/imgnet/"
# What lies there: imagenet (train/<class>/*, val/<class>/*) | cf100 (CIFAR-100) | digits | shapes
_C.DATA.DATASET = "imagenet"
# Side of a training image in pixels, or [height, width]; null: the architecture's own.
_C.DATA.IMG_SIZE = None
# Side of a test image in pixels, or [height, width]; null: IMG_SIZE.
_C.DATA.TEST_SIZE = None
# Test images per process and step; at least 1; null: BATCH_SIZE.
_C.DATA.TEST_BATCH_SIZE = None
# How images are resized: random (bilinear or bicubic, drawn anew for each training image) | bilinear | bicubic
_C.DATA.INTERPOLATION = "bilinear"
# Whether the images are read from zip archives, and not from folders.
_C.DATA.ZIP_MODE = False
# What of the archives is held in memory: no (nothing) | part (each process a share) | full (each process everything)
_C.DATA.CACHE_MODE = "part"
# Whether loaded batches lie in page-locked memory, from where the copy to a GPU is faster.
_C.DATA.PIN_MEMORY = True
# Worker processes that load images, for each process; 0: the process itself loads them.
_C.DATA.NUM_WORKERS = 8
# Whether a missing data set may be downloaded. The network is used only where this is true.
_C.DATA.DOWNLOAD = False
# Distinct unreadable training images that are tolerated (and replaced) before a run stops; 0: none.
_C.DATA.MAX_UNREADABLE = 10

# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------
_C.MODEL = CfgNode()
# Name of the network: one of models.list_models(), or any name that timm knows. An evaluation takes that of the
# checkpoint where none is given, and likewise IMG_SIZE and what of the structure the keys below leave open.
_C.MODEL.ARCH = "RepMLPNet-B224"
# Checkpoint whose run is continued, or which is evaluated; empty: none.
_C.MODEL.RESUME = ""
# Checkpoint whose weights a new run starts from, at epoch 0; empty: none.
_C.MODEL.PRETRAINED = ""
# Number of classes, at least 1; null: counted from the data set.
_C.MODEL.NUM_CLASSES = None
# Share of every label that is spread over all classes; 0 (off) to below 1. Mixup and CutMix smooth by it as well.
_C.MODEL.LABEL_SMOOTHING = 0.1
# Probability that a residual branch of the last block is dropped (stochastic depth); 0 (off) to below 1.
_C.MODEL.DROP_PATH = 0.0
# Kernel sizes of the local branches, odd, such as [1, 3]; [] has none; null: the architecture's own.
_C.MODEL.BRANCHES = None
# Share-sets of each stage, such as [1, 4, 16, 128], which divide its channels; null: the architecture's own.
_C.MODEL.SHARE_SETS = None
# Whether the blocks have a Global Perceptron; null: as the architecture has it.
_C.MODEL.GLOBAL_PERCEPTRON = None

# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
_C.TRAIN = CfgNode()
# Epoch to begin with, from 0; a resumed run begins where its checkpoint ended.
_C.TRAIN.START_EPOCH = 0
# Epochs in all, the warm-up included; at least 1.
_C.TRAIN.EPOCHS = 100
# Epochs in which the learning rate rises linearly from WARMUP_LR; 0 (none) to below EPOCHS.
_C.TRAIN.WARMUP_EPOCHS = 10
# Weight decay, at least 0; biases and normalisation have none.
_C.TRAIN.WEIGHT_DECAY = 0.1
# Highest learning rate, per 256 images of global batch; at least 0.
_C.TRAIN.BASE_LR = 0.002
# Learning rate at the first step of the warm-up, per 256 images of global batch; at least 0.
_C.TRAIN.WARMUP_LR = 0.0
# Learning rate at the end, per 256 images of global batch; 0 to BASE_LR.
_C.TRAIN.MIN_LR = 0.0
# Largest L2 norm of the gradient, which is scaled down to it; 0: unlimited.
_C.TRAIN.CLIP_GRAD = 5.0
# How many updates may be skipped, because loss or gradients are not finite, before the run is stopped; 0: none.
_C.TRAIN.MAX_SKIPPED = 20
# Whether a run that finds its own latest checkpoint in the output folder continues from it.
_C.TRAIN.AUTO_RESUME = True
# Steps whose gradients are summed up before one update; 0 and 1: none.
_C.TRAIN.ACCUMULATION_STEPS = 0
# Whether activations are computed again in the backward pass, which saves memory and costs time.
_C.TRAIN.USE_CHECKPOINT = False
# Whether BatchNorm takes its statistics over all processes.
_C.TRAIN.SYNC_BN = False

_C.TRAIN.LR_SCHEDULER = CfgNode()
# Course of the learning rate after the warm-up: cosine | linear | step
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"
# Epochs between two decays of `step`; at least 1.
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30
# Factor of one decay of `step`; above 0, at most 1.
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1
# Whether the schedule starts after the warm-up. False, as published: it already runs beneath it, so that the learning
# rate drops a little where the warm-up ends.
_C.TRAIN.LR_SCHEDULER.WARMUP_PREFIX = False

_C.TRAIN.OPTIMIZER = CfgNode()
# Optimizer: adamw | sgd (with Nesterov momentum)
_C.TRAIN.OPTIMIZER.NAME = "adamw"
# Term that keeps the denominator of adamw from zero; above 0.
_C.TRAIN.OPTIMIZER.EPS = 1e-8
# Decay of adamw's running means of the gradient and of its square; each 0 to below 1.
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)
# Momentum of sgd; 0 to below 1.
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9

# Weight of the newest weights in the moving average, per image of global batch, for an average of every update in a run
# of one epoch; 0 (off) to below 1. As published, the average forgets more slowly in a longer run: its decay is
# 1 - EMA_ALPHA x global batch / EPOCHS x EMA_UPDATE_PERIOD, 0.998 for EMA_ALPHA 1e-4 with a global batch of 256, 100
# epochs and a period of 8. The log names it; so small a decay that the average would be a mere copy is refused.
_C.TRAIN.EMA_ALPHA = 0.0
# Optimizer updates between two updates of that average; at least 1.
_C.TRAIN.EMA_UPDATE_PERIOD = 8

# ---------------------------------------------------------------------------------------------------------------------
# Augmentation
# ---------------------------------------------------------------------------------------------------------------------
_C.AUG = CfgNode()
# Alpha of Mixup's beta distribution; 0: no Mixup.
_C.AUG.MIXUP = 0.0
# Alpha of CutMix's beta distribution; 0: no CutMix, unless CUTMIX_MINMAX is set.
_C.AUG.CUTMIX = 0.0
# [least, greatest] share of the image's side that CutMix pastes, 0 to 1, in place of CUTMIX; null: by CUTMIX.
_C.AUG.CUTMIX_MINMAX = None
# Probability that a batch is mixed at all; 0 to 1.
_C.AUG.MIXUP_PROB = 1.0
# Probability that CutMix mixes it, where both are on; 0 to 1.
_C.AUG.MIXUP_SWITCH_PROB = 0.5
# What shares one draw of the mixing: batch | pair (two images) | elem (each image its own)
_C.AUG.MIXUP_MODE = "batch"
# Ready-made augmentation: none | flip | weak | raug10 | raug15 | raug20 | raug25 | shift | crop; null: by the keys
# below, which a preset replaces.
_C.AUG.PRESET = None
# Strength of random brightness, contrast and saturation, at least 0; used where AUTO_AUGMENT is none.
_C.AUG.COLOR_JITTER = 0.4
# Policy in timm's notation (rand-..., augmix-..., original, originalr, v0, v0r, 3a); none: off.
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
# Probability that a rectangle of the image is erased; 0 (off) to 1.
_C.AUG.REPROB = 0.25
# What fills the rectangle: const (zeros) | rand (one random colour) | pixel (noise)
_C.AUG.REMODE = "pixel"
# Rectangles that are erased in one image; at least 1.
_C.AUG.RECOUNT = 1

# ---------------------------------------------------------------------------------------------------------------------
# Testing
# ---------------------------------------------------------------------------------------------------------------------
_C.TEST = CfgNode()
# Whether the image covers 256/224 of TEST_SIZE and its centre is cut out; else it is resized to TEST_SIZE itself.
_C.TEST.CROP = False
# Whether an evaluation takes the moving average of the weights in a checkpoint; null: as the checkpoint says, which is
# the average of one that was chosen by it.
_C.TEST.EMA = None

# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
# Mixed precision: auto (bf16 on a GPU, off on a CPU) | off (float32) | bf16 | fp16 (with loss scaling)
_C.AMP = "auto"
# Whether the network goes through torch.compile.
_C.COMPILE = False
# What torch.compile strives for: default | reduce-overhead (CUDA graphs, for small batches) | max-autotune (tries many
# kernels and uses CUDA graphs; compiles for long) | max-autotune-no-cudagraphs
_C.COMPILE_MODE = "default"
# Whether maps are laid out channels-last, which makes convolutional networks of timm faster, but not a RepMLPNet.
_C.CHANNELS_LAST = False
# Whether only deterministic algorithms are used, which is slower.
_C.DETERMINISTIC = False
# Folder of all runs; a run writes to OUTPUT/ARCH/TAG.
_C.OUTPUT = "output"
# Name of this run, which is that of its folder.
_C.TAG = "default"
# Epochs between two numbered checkpoints; at least 1.
_C.SAVE_FREQ = 20
# Updates between two saves of the latest checkpoint within an epoch; 0: at the end of each epoch only.
_C.SAVE_STEPS = 0
# How many numbered checkpoints stay, the newest ones; 0: none. The latest and the best stay in any case.
_C.KEEP_CHECKPOINTS = 3
# Epochs between two evaluations, at least 1; the last epoch is always evaluated.
_C.EVAL_FREQ = 1
# Steps between two lines of the log; 1 to 10000.
_C.PRINT_FREQ = 10
# Seed of every random number; 0 to 2^32 - 1.
_C.SEED = 0
# Whether the checkpoint MODEL.RESUME is evaluated, and nothing trained.
_C.EVAL_MODE = False
# Whether images per second are measured, and nothing trained.
_C.THROUGHPUT_MODE = False

# What the keys hold whose default does not tell it: it is null, or text that is a path.
SPECIAL: dict[str, Kind] = {
    "DATA.DATA_PATH": PATH,
    "MODEL.RESUME": PATH,
    "MODEL.PRETRAINED": PATH,
    "OUTPUT": PATH,
    "DATA.IMG_SIZE": optional(SIZE),
    "DATA.TEST_SIZE": optional(SIZE),
    "DATA.TEST_BATCH_SIZE": optional(INTEGER),
    "MODEL.NUM_CLASSES": optional(INTEGER),
    "MODEL.BRANCHES": optional(INTEGERS),
    "MODEL.SHARE_SETS": optional(INTEGERS),
    "MODEL.GLOBAL_PERCEPTRON": optional(BOOLEAN),
    "TEST.EMA": optional(BOOLEAN),
    "AUG.CUTMIX_MINMAX": optional(NUMBER_PAIR),
    "AUG.PRESET": optional(TEXT),
}

# Keys of the published code that are gone, and what to do about it.
RETIRED: dict[str, str] = {
    "AMP_OPT_LEVEL": "use AMP: off for O0, fp16 or bf16 for O1 and O2",
    "LOCAL_RANK": "leave it out, the launcher (torchrun) tells each process its rank in the environment",
}


def defaults() -> CfgNode:
    """Returns a new copy of the schema with every key at its default."""
    return _C.clone()
