"""Names of other projects: the key that corresponds to each, or advice where there is none."""

_LAUNCHER = "it is set by the launcher: torchrun --nproc_per_node N main_repmlp.py ..., see docs/distributed.md"
_DEVICE = "a process uses a GPU if one is visible, else the CPU; set CUDA_VISIBLE_DEVICES"
_CURVES = "every run writes TensorBoard events and metrics.jsonl to its folder"
_LOSS = "the loss follows from TASK: cross entropy (MODEL.LABEL_SMOOTHING), or a margin softmax (FACE.LOSS)"

# A key, or advice, and its names: in lower case, with _ for -, and with dots where only the full key is meant.
_WORDS: dict[str, str] = {
    "TASK": "task task_type",
    "TRAIN.BASE_LR": "lr learning_rate base_lr blr init_lr max_lr",
    "TRAIN.MIN_LR": "min_lr final_lr",
    "TRAIN.WARMUP_LR": "warmup_lr warmup_lr_init lr_warmup_decay",
    "TRAIN.EPOCHS": "epochs num_epochs max_epochs n_epochs",
    "TRAIN.START_EPOCH": "start_epoch",
    "TRAIN.WARMUP_EPOCHS": "warmup warmup_epochs lr_warmup_epochs",
    "TRAIN.WEIGHT_DECAY": "wd weight_decay",
    "TRAIN.CLIP_GRAD": "clip_grad grad_clip clip clip_grad_norm max_norm max_grad_norm",
    "TRAIN.ACCUMULATION_STEPS": "accum_iter accumulation grad_accum_steps gradient_accumulation_steps update_freq",
    "TRAIN.USE_CHECKPOINT": "grad_checkpointing gradient_checkpointing checkpointing",
    "TRAIN.SYNC_BN": "sync_bn syncbn sync_batchnorm",
    "TRAIN.AUTO_RESUME": "auto_resume no_auto_resume no_resume",
    "TRAIN.LR_SCHEDULER.NAME": "sched scheduler lr_scheduler lr_schedule lr_policy",
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": "decay_epochs lr_step_size step_size",
    "TRAIN.LR_SCHEDULER.MILESTONES": "milestones decay_milestones lr_steps lr_milestones",
    "TRAIN.LR_SCHEDULER.POWER": "power lr_power poly_power",
    "TRAIN.LR_SCHEDULER.DECAY_RATE": "decay_rate lr_gamma gamma",
    "TRAIN.OPTIMIZER.NAME": "opt optim optimizer",
    "TRAIN.OPTIMIZER.EPS": "opt_eps eps adam_eps",
    "TRAIN.OPTIMIZER.BETAS": "opt_betas betas adam_betas beta1 beta2",
    "TRAIN.OPTIMIZER.MOMENTUM": "momentum",
    "TRAIN.EMA_ALPHA": "ema model_ema ema_decay model_ema_decay",
    "TRAIN.EMA_UPDATE_PERIOD": "model_ema_steps ema_steps",
    "DATA.BATCH_SIZE": "b bs batch_size_per_gpu train_batch_size",
    "DATA.TEST_BATCH_SIZE": "val_batch_size eval_batch_size test_batch_size vb",
    "DATA.DATA_PATH": "data_dir data_root root imagenet imagenet_path train_dir",
    "DATA.DATASET": "data_set dataset_name",
    "DATA.FORMAT": "data_format dataset_format",
    "DATA.VAL_FRACTION": "val_fraction val_split validation_split val_ratio test_split",
    "DATA.FOLD": "fold fold_index",
    "DATA.NUM_WORKERS": "j workers num_workers nw",
    "DATA.IMG_SIZE": "r img_size image_size imgsz input_size resolution crop_size train_crop_size",
    "DATA.TEST_SIZE": "test_size eval_size val_size val_crop_size val_resize_size",
    "DATA.INTERPOLATION": "interpolation train_interpolation",
    "DATA.PIN_MEMORY": "pin_mem pin_memory no_pin_memory",
    "DATA.DOWNLOAD": "dataset_download download",
    "MODEL.ARCH": "a model model.name model.type model_name net network backbone",
    "MODEL.RESUME": "checkpoint ckpt checkpoint_path weights load resume_from",
    "MODEL.PRETRAINED": "finetune fine_tune initial_checkpoint init_weights pretrained_path",
    "MODEL.NUM_CLASSES": "num_classes nb_classes n_classes",
    "MODEL.LABEL_SMOOTHING": "smoothing label_smoothing",
    "MODEL.DROP_PATH": "drop_path drop_path_rate stochastic_depth dropout drop drop_rate",
    "MODEL.CHANNELS": "channels dims widths planes",
    "MODEL.BLOCKS": "blocks depths num_blocks layers",
    "SEG.DECODER": "decoder decode_head head seg_head decoder_name",
    "SEG.WIDTH": "decoder_channels decoder_width psp_out_channels head_channels",
    "SEG.DOWNSAMPLE": "downsample downsampling",
    "SEG.RANK": "rank_of_downsampling downsample_rank",
    "SEG.BACKBONE_SIZE": "backbone_size pretrain_img_size",
    "SEG.SCALE": "scale_range ratio_range scale_limit random_scale",
    "FACE.EMBEDDING": "embedding embedding_size embedding_dim embed_dim emb_size feat_dim",
    "FACE.LOSS": "margin_loss head_type arcface cosface amsoftmax am_softmax",
    "FACE.MARGIN": "margin arc_m cos_m",
    "FACE.SCALE": "logit_scale cosine_scale",
    "FACE.PAIRS": "pairs pairs_file pairs_txt",
    "FACE.NUM_PAIRS": "num_pairs n_pairs",
    "FACE.FOLDS": "folds num_folds n_folds nrof_folds",
    "AUG.MIXUP": "mixup mixup_alpha",
    "AUG.CUTMIX": "cutmix cutmix_alpha",
    "AUG.AUTO_AUGMENT": "aa auto_augment autoaugment randaugment rand_augment",
    "AUG.PRESET": "augment augmentation preset",
    "AUG.COLOR_JITTER": "color_jitter colour_jitter jitter",
    "AUG.REPROB": "reprob random_erase random_erasing random_erasing_prob erasing",
    "TEST.CROP": "crop_pct center_crop",
    "AMP": "fp16 bf16 half precision mixed_precision amp_dtype native_amp apex_amp dtype",
    "COMPILE": "torchcompile torch_compile",
    "TF32": "allow_tf32 matmul_precision float32_matmul_precision",
    "CUDNN_BENCHMARK": "cudnn benchmark",
    "EXPANDABLE_SEGMENTS": "expandable_segments alloc_conf cuda_alloc_conf",
    "CHANNELS_LAST": "channels_last",
    "DETERMINISTIC": "deterministic",
    "SEED": "seed random_seed manual_seed",
    "OUTPUT": "output_dir out_dir work_dir save_dir log_dir logdir results",
    "TAG": "exp_name experiment run_name exp",
    "SAVE_FREQ": "save_freq save_interval save_period",
    "KEEP_CHECKPOINTS": "checkpoint_hist keep_last",
    "EVAL_FREQ": "eval_freq eval_interval val_interval val_freq",
    "PRINT_FREQ": "log_interval print_freq log_freq disp_freq p",
    "SUMMARY_MODE": "summarize model_summary flops params count_params",
    "PROFILE_MODE": "profiler torch_profiler use_profiler trace",
    "DIST.TIMEOUT": "dist_timeout ddp_timeout nccl_timeout init_timeout timeout",
    "PEAK_TFLOPS": "peak_flops gpu_peak_flops mfu",
    "EVAL_MODE": "evaluate test_only eval_only validate val test",
    _LAUNCHER: "world_size nproc nproc_per_node nnodes node_rank rank gpus num_gpus ngpus dist_url dist_backend "
    "init_method master_addr master_port distributed multiprocessing_distributed",
    _DEVICE: "device gpu gpu_id gpu_ids cuda no_cuda use_gpu cpu accelerator",
    _CURVES: "wandb log_wandb use_wandb tensorboard trackio project",
    _LOSS: "loss criterion bce_loss loss_type",
    "give a recipe with --cfg FILE": "config config_file yaml",
    "learning rates are given per 256 images and always scaled": "scale_lr linear_scale no_scale_lr",
}
WORDS = {word: meant for meant, words in _WORDS.items() for word in words.split()}


def meant_by(word: str) -> str:
    """Returns the key that a name of other projects stands for, or advice where there is none; empty if unknown.

    Args:
        word: a flag (`--learning-rate`) or a key (`TRAIN.LR`, whose last part is enough).
    """
    plain = word.lstrip("-").lower().replace("-", "_")
    return WORDS.get(plain) or WORDS.get(plain.rsplit(".", 1)[-1], "")
