"""The schema: every key of a configuration with its meaning, unit, allowed values and default.

Values stand here as the user writes them: learning rates per 256 images of global batch, durations in epochs.
"""

from yacs.config import CfgNode

from .field_types import (
    BOOLEAN,
    INTEGER,
    INTEGERS,
    NUMBER,
    NUMBER_PAIR,
    NUMBERS,
    PATH,
    SIZE,
    SWITCH,
    TEXT,
    FieldType,
    optional,
)

_C = CfgNode()

# YAML files that a YAML file is based on, each relative to the file that names it. Later files override earlier ones,
# and the file itself overrides all of them. A loaded configuration is complete, so its BASE is empty.
_C.BASE = [""]
# What the network is trained for: classification | segmentation | verification (of faces). Keys that a task does not
# use must keep their defaults.
_C.TASK = "classification"

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
_C.DATA = CfgNode()
# Training images per process and step; at least 1, for segmentation 2, since its decoders normalize over the images of
# a batch. The global batch is this x processes x ACCUMULATION_STEPS.
_C.DATA.BATCH_SIZE = 128
# Folder of the data set; `digits` and `shapes` name data sets that come with the project and need no folder.
_C.DATA.DATA_PATH = "/path/to/imgnet/"
# Which data set it is: imagenet (images of any classes, train/<class>/*, val/<class>/*) | cf10 (CIFAR-10) | cf100
# (CIFAR-100) | digits | shapes | cityscapes (leftImg8bit/, gtFine/) | faces (train/<person>/*, val/<other person>/*) |
# torchvision/NAME (such as Flowers102, read by torchvision) | hfds/NAME (of the Hugging Face hub) | tfds/NAME (of
# TensorFlow Datasets)
_C.DATA.DATASET = "imagenet"
# How the images of imagenet and faces are stored: folder | zip (train.zip, train_map.txt) | tar (train-000000.tar ...,
# with WebDataset's names, or a folder or a tar file for each class) | list (train.csv: path,label). Null: folder, or
# zip under ZIP_MODE.
_C.DATA.FORMAT = None
# Fraction of the training images of each class that is held out as test images, in place of the data set's own; 0
# (none) to below 1.
_C.DATA.VAL_FRACTION = 0.0
# Number of parts of equal size that the training images of each class are divided into, one of which is held out as
# test images; at least 2; 0: they are not divided.
_C.DATA.FOLDS = 0
# Which of the FOLDS is held out, from 0.
_C.DATA.FOLD = 0
# Seed of both divisions; 0 to 2^32 - 1. The images held out depend on it and on the names of the images alone.
_C.DATA.SPLIT_SEED = 0
# Side of a training image in pixels, or [height, width]; for segmentation, of the random crop. Null: the
# architecture's own.
_C.DATA.IMG_SIZE = None
# Side of a test image in pixels, or [height, width]; null: IMG_SIZE for classification and verification, whole images
# for segmentation.
_C.DATA.TEST_SIZE = None
# Test images per process and step; at least 1; null: BATCH_SIZE, or 1 where test images keep their own sizes.
_C.DATA.TEST_BATCH_SIZE = None
# Interpolation when images are resized: bilinear | bicubic | random (one of the two for each training image)
_C.DATA.INTERPOLATION = "bilinear"
# What decodes JPEG files: simplejpeg (of requirements-fast.txt; faster) | pillow (resizes, too, bit for bit as the
# published code; simplejpeg comes with torch's resizing, within 1 of 255) | auto (simplejpeg where it is installed)
_C.DATA.DECODER = "auto"
# Channels of the images, to which they are converted: 1 (grey) | 3 (RGB) | 4 (RGB and transparency, or any four bands
# that are stored so). Null: those of the weights to evaluate, or 3. With 1 or 4, AUG has no policy (AUTO_AUGMENT none),
# and no raug preset; with 4 no COLOR_JITTER.
_C.DATA.CHANNELS = None
# Mean of the pixels of each channel, on a scale of 0 to 1, by which images are normalised, such as
# [0.485, 0.456, 0.406]. Null: that of the weights to evaluate, which checkpoints of a run hold, or of the data set,
# which has none for 4 channels.
_C.DATA.MEAN = None
# Standard deviation of the pixels of each channel, likewise.
_C.DATA.STD = None
# Whether the list of the files of an image folder is saved in the user's cache folder (~/.cache/repmlpnet), from 10,000
# images on, and read from there as long as no folder in it has changed; False: it is made anew at every start.
_C.DATA.INDEX = True
# Whether the images are read from zip archives instead of folders; the older name of FORMAT zip.
_C.DATA.ZIP_MODE = False
# How much of the archives is cached in memory: no (nothing) | part (in each process its shard) | full (in each process
# everything)
_C.DATA.CACHE_MODE = "part"
# Whether batches are loaded into page-locked memory, from which copies to a GPU are faster.
_C.DATA.PIN_MEMORY = True
# Data loading workers of each process; 0: images are loaded in the process itself.
_C.DATA.NUM_WORKERS = 8
# Whether a missing data set may be downloaded; nothing else uses the network.
_C.DATA.DOWNLOAD = False
# How often the classes are drawn for training: uniform (each image once an epoch) | sqrt (in proportion to the square
# root of their number of images) | balanced (all equally often). An epoch has as many images as before: of a rare class
# the same ones several times, each time augmented differently, and of a common one a part.
_C.DATA.SAMPLING = "uniform"
# Repeated augmentation: how often an epoch has each of its images, close together and augmented differently; 1 to 100,
# 3 in DeiT. It has as many images as before, so that it has a part of the data set.
_C.DATA.REPEATED_AUG = 1
# Number of different unreadable training images that are replaced by others before the run stops; 0: none.
_C.DATA.MAX_UNREADABLE = 10

# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------
_C.MODEL = CfgNode()
# Name of the network: one of models.list_models(), or of timm. An evaluation defaults to that of the checkpoint; so do
# IMG_SIZE and the parts of the structure below.
_C.MODEL.ARCH = "RepMLPNet-B224"
# Checkpoint to resume from, or to evaluate; empty: none.
_C.MODEL.RESUME = ""
# Checkpoint with the initial weights of a new run; empty: none. For segmentation, a classifier, which becomes the
# backbone.
_C.MODEL.PRETRAINED = ""
# Number of classes, at least 1; null: counted from the data set.
_C.MODEL.NUM_CLASSES = None
# Label smoothing: the part of each target that is spread over all classes; 0 (off) to below 1. Applies to the targets
# of Mixup and CutMix as well.
_C.MODEL.LABEL_SMOOTHING = 0.1
# Probability that a residual branch of the last block is dropped (stochastic depth); 0 (off) to below 1.
_C.MODEL.DROP_PATH = 0.0
# Channels of each stage, such as [64, 128, 256, 512]; null: the architecture's own.
_C.MODEL.CHANNELS = None
# Blocks of each stage, such as [2, 2, 6, 2]; null: the architecture's own.
_C.MODEL.BLOCKS = None
# Kernel sizes of the local branches, odd, such as [1, 3]; []: no branches; null: the architecture's own.
_C.MODEL.BRANCHES = None
# Share-sets of each stage, such as [1, 4, 16, 128], divisors of its channels; null: the architecture's own.
_C.MODEL.SHARE_SETS = None
# Groups of FC3 and of the local branches, of each stage of a RepMLP-ResNet, such as [8, 8, 8, 8]; null: the
# architecture's own.
_C.MODEL.GROUPS = None
# Reduction of the channels before the RepMLPs, of each stage of a RepMLP-ResNet, such as [0, 2, 4, 0]; 0: the stage has
# no RepMLP; null: the architecture's own.
_C.MODEL.REDUCTIONS = None
# Reduction of the hidden width of the Global Perceptrons: of each stage of a RepMLP-ResNet, such as [1, 4, 8, 1], or
# one number for a RepMLPNet; null: the architecture's own. For segmentation, that of a RepMLP-ResNet may differ from
# that of MODEL.PRETRAINED.
_C.MODEL.GP_REDUCTION = None
# Whether the blocks have a Global Perceptron; null: the architecture's own.
_C.MODEL.GLOBAL_PERCEPTRON = None
# What mixes the positions in the blocks of a PureMLP: repmlp | fc3_as_conv9 | conv9 | conv3 (convolutions in place of
# FC3 or of RepMLP); null: the architecture's own.
_C.MODEL.MIXER = None
# Whether the structure to train is the converted one with a BatchNorm after every FC3, to fine-tune converted weights
# (PRETRAINED); null: no.
_C.MODEL.INSERT_BN = None

# ---------------------------------------------------------------------------------------------------------------------
# Segmentation
# ---------------------------------------------------------------------------------------------------------------------
_C.SEG = CfgNode()
# Decoder over the levels of the backbone: upernet | pspnet
_C.SEG.DECODER = "upernet"
# Channels of the decoder; at least 1.
_C.SEG.WIDTH = 512
# Replacement of the 2x2 embeddings of a RepMLPNet: conv3 | conv5 (a 1x1 convolution, then a depth-wise 3x3 or 5x5
# convolution of stride 2); null: none.
_C.SEG.DOWNSAMPLE = None
# Rank of the replacement's approximation of an embedding, 1 to 4: 4 is exact at the start, 1 is the cheapest.
_C.SEG.RANK = 4
# Weight of the loss of an auxiliary FCN head on the last level but one, in training alone: 0 (no such head) to 10; 0.4
# in MMSegmentation.
_C.SEG.AUX_WEIGHT = 0.0
# Side of the images in pixels, or [height, width], that the partitions of a RepMLPNet or the Global Perceptrons of a
# RepMLP-ResNet are made for; null: that of the pretrained weights, or the architecture's own. A RepMLP-ResNet may have
# another size than its pretrained weights: its Global Perceptrons are then initialised anew.
_C.SEG.BACKBONE_SIZE = None
# Stride of the backbone's last map: 8 | 16 | 32. The stages of a ResNet or RepMLP-ResNet that would go beyond it keep
# the size of their maps, and their 3x3 convolutions are dilated where the stage has no RepMLP. Null: the
# architecture's own.
_C.SEG.OUTPUT_STRIDE = None
# [smallest, largest] factor of the random scaling of training images, 0.1 to 10.
_C.SEG.SCALE = (0.5, 2.0)

# ---------------------------------------------------------------------------------------------------------------------
# Face verification
# ---------------------------------------------------------------------------------------------------------------------
_C.FACE = CfgNode()
# Dimension of the embedding; at least 1.
_C.FACE.EMBEDDING = 512
# Margin softmax: arcface | cosface | amsoftmax (cosface with the scale of its own paper)
_C.FACE.LOSS = "arcface"
# Its margin: an angle in degrees for arcface, 0 to 90; a cosine for cosface and amsoftmax, 0 to 1. Null: that of its
# paper, 28.6 degrees (0.5 radians) or 0.35.
_C.FACE.MARGIN = None
# Factor of the cosines before the softmax; above 0. Null: that of the loss's paper, 64, or 30 for amsoftmax.
_C.FACE.SCALE = None
# Path of a list of image pairs to verify; empty: pairs are drawn at random, the same in each run.
_C.FACE.PAIRS = ""
# Pairs to draw, half of them of one person; at least 4.
_C.FACE.NUM_PAIRS = 6000
# Folds of the cross-validation that chooses the threshold; at least 2.
_C.FACE.FOLDS = 10

# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
_C.TRAIN = CfgNode()
# Epoch to start at, counted from 0; a resumed run starts at that of its checkpoint.
_C.TRAIN.START_EPOCH = 0
# Number of epochs, warm-up included; at least 1.
_C.TRAIN.EPOCHS = 100
# Epochs of linear warm-up from WARMUP_LR; 0 (none) to below EPOCHS.
_C.TRAIN.WARMUP_EPOCHS = 10
# Weight decay, at least 0; not applied to biases and normalization layers.
_C.TRAIN.WEIGHT_DECAY = 0.1
# Peak learning rate, per 256 images of global batch; at least 0.
_C.TRAIN.BASE_LR = 0.002
# Learning rate at the first step of the warm-up, per 256 images of global batch; at least 0.
_C.TRAIN.WARMUP_LR = 0.0
# Final learning rate, per 256 images of global batch; 0 to BASE_LR.
_C.TRAIN.MIN_LR = 0.0
# L2 norm to which the gradient is clipped; 0: no clipping.
_C.TRAIN.CLIP_GRAD = 5.0
# Number of updates that may be skipped, because loss or gradients are not finite, before the run stops; 0: none.
_C.TRAIN.MAX_SKIPPED = 20
# Whether a run resumes from the latest checkpoint in its output folder, if there is one.
_C.TRAIN.AUTO_RESUME = True
# Steps whose gradients are accumulated for one update; 0 and 1: no accumulation.
_C.TRAIN.ACCUMULATION_STEPS = 0
# Gradient checkpointing: whether activations are recomputed in the backward pass, which saves memory and costs time.
_C.TRAIN.USE_CHECKPOINT = False
# Weights of the classes in the loss: none | balanced (inversely proportional to their number of training images). Their
# mean over the images is 1, and the loss is divided by the number of images, not by the sum of their weights.
_C.TRAIN.CLASS_WEIGHTS = "none"
# Whether BatchNorm statistics are computed over all processes.
_C.TRAIN.SYNC_BN = False

_C.TRAIN.LR_SCHEDULER = CfgNode()
# Learning rate schedule after the warm-up: cosine | poly | linear | step | multistep. Both cosine and poly end at
# MIN_LR, linear ends at a hundredth of BASE_LR.
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"
# Epochs between decays of the schedule `step`; at least 1.
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30
# Epochs, or fractions of epochs, after which the schedule `multistep` decays, counted from the start of the training,
# in ascending order, below EPOCHS; they are rounded to updates.
_C.TRAIN.LR_SCHEDULER.MILESTONES = (30.0, 60.0, 90.0)
# Factor of each decay of the schedules `step` and `multistep`; above 0, at most 1.
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1
# Exponent of the schedule `poly`: the learning rate falls as (1 - t / length) ** POWER; above 0, at most 10.
_C.TRAIN.LR_SCHEDULER.POWER = 0.9
# Whether the schedule starts after the warm-up. False, as published: it starts with the warm-up, so that the learning
# rate drops slightly at its end.
_C.TRAIN.LR_SCHEDULER.WARMUP_PREFIX = False

_C.TRAIN.OPTIMIZER = CfgNode()
# Optimizer: adamw | lamb (whose gradients its authors clip: CLIP_GRAD 1) | sgd (with Nesterov momentum)
_C.TRAIN.OPTIMIZER.NAME = "adamw"
# Epsilon of adamw and lamb, added to their denominator; from 1e-30 to 1.
_C.TRAIN.OPTIMIZER.EPS = 1e-8
# Decay rates of the moments of adamw and lamb, of the gradient and of its square; each 0 to below 1.
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)
# Momentum of sgd; 0 to below 1.
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9

# Exponential moving average (EMA) of the weights, as published: 0 (off) to below 1. Its decay is
# 1 - EMA_ALPHA x global batch / EPOCHS x EMA_UPDATE_PERIOD, 0.998 for EMA_ALPHA 1e-4 with a global batch of 256, 100
# epochs and a period of 8. The log states the decay; it must be above 0.
_C.TRAIN.EMA_ALPHA = 0.0
# Optimizer updates between updates of the EMA; at least 1.
_C.TRAIN.EMA_UPDATE_PERIOD = 8

# ---------------------------------------------------------------------------------------------------------------------
# Distillation
# ---------------------------------------------------------------------------------------------------------------------
_C.DISTILL = CfgNode()
# Checkpoint of a trained classifier of the same classes, in either form, whose predictions take part in the targets;
# empty: none.
_C.DISTILL.TEACHER = ""
# Its architecture, such as regnety_160 of timm; empty: that of the checkpoint.
_C.DISTILL.ARCH = ""
# Weight of its predictions in the loss, the labels have the rest; 0 to 1.
_C.DISTILL.WEIGHT = 0.5

# ---------------------------------------------------------------------------------------------------------------------
# Augmentation
# ---------------------------------------------------------------------------------------------------------------------
_C.AUG = CfgNode()
# Alpha of Mixup's beta distribution, at least 0; 0: no Mixup.
_C.AUG.MIXUP = 0.0
# Alpha of CutMix's beta distribution, at least 0; 0: no CutMix, unless CUTMIX_MINMAX is set.
_C.AUG.CUTMIX = 0.0
# [smallest, largest] side of the box that CutMix pastes, as a fraction of the image's, 0 to 1; overrides CUTMIX. Null:
# not used.
_C.AUG.CUTMIX_MINMAX = None
# Probability of applying Mixup or CutMix; 0 to 1.
_C.AUG.MIXUP_PROB = 1.0
# Probability of CutMix instead of Mixup where both are on; 0 to 1.
_C.AUG.MIXUP_SWITCH_PROB = 0.5
# How often the mixing is drawn: once per batch | pair (of images) | elem (image)
_C.AUG.MIXUP_MODE = "batch"
# Augmentation preset: none | flip | weak | raug10 | raug15 | raug20 | raug25 | shift | crop; null: timm's pipeline with
# COLOR_JITTER and AUTO_AUGMENT, which a preset ignores.
_C.AUG.PRESET = None
# [smallest, largest] area of the random part that a training image is cropped to, as a fraction of the image's; in the
# presets weak and raug..., and in timm's pipeline where training images have a side of more than 32 pixels.
_C.AUG.SCALE = (0.08, 1.0)
# [smallest, largest] width of that part over its height.
_C.AUG.RATIO = (3 / 4, 4 / 3)
# Probability of swapping left and right, 0 to 1; in timm's pipeline and all presets but none and shift.
_C.AUG.HFLIP = 0.5
# Probability of swapping top and bottom, likewise.
_C.AUG.VFLIP = 0.0
# Strength of color jitter (brightness, contrast, saturation), at least 0; applied where AUTO_AUGMENT is none or 3a.
_C.AUG.COLOR_JITTER = 0.4
# Policy of augmentation in timm's notation (rand-..., augmix-..., original, originalr, v0, v0r: AutoAugment; 3a: the
# 3-Augment of DeiT III), or one of torchvision: trivial (TrivialAugment, wide) | cifar10 | svhn (AutoAugment, as found
# for these data sets); none: off.
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
# Where RandAugment is applied, that of a preset or of AUTO_AUGMENT: cpu (with Pillow, by the data loading processes) |
# gpu (to whole batches, on the device of the run) | auto: on the device if it is a GPU. Other policies: on the CPU.
_C.AUG.DEVICE = "auto"
# Probability of random erasing; 0 (off) to 1.
_C.AUG.REPROB = 0.25
# Fill of erased rectangles: const (zeros) | rand (one random color) | pixel (noise)
_C.AUG.REMODE = "pixel"
# Maximum number of erased rectangles per image; at least 1.
_C.AUG.RECOUNT = 1

# ---------------------------------------------------------------------------------------------------------------------
# Testing
# ---------------------------------------------------------------------------------------------------------------------
_C.TEST = CfgNode()
# Whether images are resized to 256/224 of TEST_SIZE and center-cropped; otherwise they are resized to TEST_SIZE.
_C.TEST.CROP = False
# Whether an evaluation uses the EMA weights of a checkpoint; null: as the checkpoint says, which is true where they
# were the best.
_C.TEST.EMA = None
# Of an evaluation, a file with the names of the network's outputs, one a line in their order, in place of those in the
# checkpoint; the classes of the test images are found among them. Empty: none.
_C.TEST.CLASSES = ""
# Whether only the logits of the classes that the test images have are compared, where the network has others besides,
# as published for ImageNet-A and -R.
_C.TEST.MASK = True
# Whether an evaluation on the validation set of ImageNet also counts by the ReaL labels.
_C.TEST.REAL_LABELS = False
# Whether an evaluation also gives the accuracy of each class.
_C.TEST.PER_CLASS = False

# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------
_C.DIST = CfgNode()
# Minutes that a process waits for the others before it ends, 0.01 to 100000. One of them may need long for a checkpoint
# on a slow disk, or its part of an evaluation.
_C.DIST.TIMEOUT = 30.0

# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
# Mixed precision: auto (bf16 on a GPU, off on a CPU) | off (float32) | bf16 | fp16 (with loss scaling)
_C.AMP = "auto"
# Whether the network is trained, or timed, in a form compiled by torch.compile; auto: it is trained so where a
# measurement has shown a gain for the device and AMP, and where the compiler works (engine/compilation.py; so far
# nowhere). The log says what auto comes to.
_C.COMPILE = "auto"
# Mode of torch.compile: default | reduce-overhead (CUDA graphs, for batches of few images, where a GPU waits for the
# host) | max-autotune (benchmarks kernels and uses CUDA graphs; compiles for long) | max-autotune-no-cudagraphs. Those
# with CUDA graphs have not been tried in training, and do not go with ACCUMULATION_STEPS.
_C.COMPILE_MODE = "default"
# Whether a GPU may round the factors of float32 products and convolutions to TF32 (10 bits of mantissa): faster where
# AMP is off, without effect under bf16 and fp16.
_C.TF32 = False
# Whether cuDNN times its convolutions for every new shape and takes the fastest; off under DETERMINISTIC.
_C.CUDNN_BENCHMARK = True
# Whether a GPU's memory is reserved in segments that grow, so that inputs of many sizes fragment it less. A setting of
# the allocator in the environment (PYTORCH_ALLOC_CONF, PYTORCH_CUDA_ALLOC_CONF) stays as it is.
_C.EXPANDABLE_SEGMENTS = False
# Whether the channels-last memory format is used; faster for convolutional networks of timm, but not for a RepMLPNet.
_C.CHANNELS_LAST = False
# Whether only deterministic algorithms are used; slower.
_C.DETERMINISTIC = False
# Folder of all runs; a run writes to OUTPUT/ARCH/TAG.
_C.OUTPUT = "output"
# Name of the run and of its folder.
_C.TAG = "default"
# Epochs between numbered checkpoints; at least 1.
_C.SAVE_FREQ = 20
# Updates between saves of the latest checkpoint within an epoch; 0: at the end of each epoch only.
_C.SAVE_STEPS = 0
# Number of numbered checkpoints to keep, the newest ones; 0: none. The latest and the best are always kept.
_C.KEEP_CHECKPOINTS = 3
# Epochs between evaluations, at least 1; the last epoch is always evaluated.
_C.EVAL_FREQ = 1
# Steps between log lines; 1 to 10000.
_C.PRINT_FREQ = 10
# Peak of the device in TFLOP/s, in the precision of the training (AMP), of which the log says the share that is
# reached. 0: that of utils/accelerators.py for the GPUs listed there, and no share on others and on CPUs.
_C.PEAK_TFLOPS = 0.0
# Seed of all random number generators; 0 to 2^32 - 1.
_C.SEED = 0
# Whether to evaluate the checkpoint MODEL.RESUME instead of training.
_C.EVAL_MODE = False
# Whether to measure images per second instead of training.
_C.THROUGHPUT_MODE = False
# Whether to print the parameters and multiply-adds of the network, by part, instead of training; reads no images.
_C.SUMMARY_MODE = False
# Whether to train for a few updates only, without saving, and to write a profile of them: a trace of torch.profiler,
# and on a GPU a snapshot of its memory.
_C.PROFILE_MODE = False

# The types of keys whose default does not tell: null, or text that is a path.
SPECIAL: dict[str, FieldType] = {
    "DATA.DATA_PATH": PATH,
    "MODEL.RESUME": PATH,
    "MODEL.PRETRAINED": PATH,
    "FACE.PAIRS": PATH,
    "DISTILL.TEACHER": PATH,
    "TEST.CLASSES": PATH,
    "OUTPUT": PATH,
    "COMPILE": SWITCH,
    "DATA.IMG_SIZE": optional(SIZE),
    "DATA.FORMAT": optional(TEXT),
    "DATA.TEST_SIZE": optional(SIZE),
    "DATA.TEST_BATCH_SIZE": optional(INTEGER),
    "DATA.CHANNELS": optional(INTEGER),
    "DATA.MEAN": optional(NUMBERS),
    "DATA.STD": optional(NUMBERS),
    "MODEL.NUM_CLASSES": optional(INTEGER),
    "MODEL.CHANNELS": optional(INTEGERS),
    "MODEL.BLOCKS": optional(INTEGERS),
    "MODEL.BRANCHES": optional(INTEGERS),
    "MODEL.SHARE_SETS": optional(INTEGERS),
    "MODEL.GROUPS": optional(INTEGERS),
    "MODEL.REDUCTIONS": optional(INTEGERS),
    "MODEL.GP_REDUCTION": optional(INTEGERS),
    "MODEL.GLOBAL_PERCEPTRON": optional(BOOLEAN),
    "MODEL.MIXER": optional(TEXT),
    "MODEL.INSERT_BN": optional(BOOLEAN),
    "SEG.DOWNSAMPLE": optional(TEXT),
    "SEG.BACKBONE_SIZE": optional(SIZE),
    "SEG.OUTPUT_STRIDE": optional(INTEGER),
    "FACE.MARGIN": optional(NUMBER),
    "FACE.SCALE": optional(NUMBER),
    "TRAIN.LR_SCHEDULER.MILESTONES": NUMBERS,
    "TEST.EMA": optional(BOOLEAN),
    "AUG.CUTMIX_MINMAX": optional(NUMBER_PAIR),
    "AUG.PRESET": optional(TEXT),
}

# Keys of the published code that no longer exist, and what to use instead.
RETIRED: dict[str, str] = {
    "AMP_OPT_LEVEL": "use AMP: off for O0, fp16 or bf16 for O1 and O2",
    "LOCAL_RANK": "leave it out, the launcher (torchrun) tells each process its rank in the environment",
}


def defaults() -> CfgNode:
    """Returns a new copy of the schema with every key at its default."""
    return _C.clone()
