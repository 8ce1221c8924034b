"""What the settings of other trainers are called, to say what to change."""

# A phrase of the advice → the setting, by trainer.
_SETTINGS = {
    "Hugging Face Trainer": {
        "learning rate": "learning_rate=",
        "warm-up": "warmup_ratio=, warmup_steps=",
        "clip the gradient norm": "max_grad_norm=",
        "bfloat16": "bf16=True",
        "weight decay": "weight_decay=",
        "(β₂)": "adam_beta2=",
        "accumulate": "gradient_accumulation_steps=",
        "lowest held-out loss": "load_best_model_at_end=True",
    },
    "Megatron-LM": {
        "learning rate": "--lr",
        "warm-up": "--lr-warmup-fraction",
        "clip the gradient norm": "--clip-grad",
        "bfloat16": "--bf16",
        "weight decay": "--weight-decay",
        "(β₂)": "--adam-beta2",
        "loss scale": "--initial-loss-scale",
    },
    "nanoGPT": {
        "learning rate": "learning_rate",
        "warm-up": "warmup_iters",
        "clip the gradient norm": "grad_clip",
        "bfloat16": "dtype='bfloat16'",
        "weight decay": "weight_decay",
        "(β₂)": "beta2",
        "accumulate": "gradient_accumulation_steps",
    },
    "llm.c": {
        "learning rate": "-l",
        "warm-up": "-u",
        "weight decay": "-c",
        "skip batches": "-sl, -sg",
    },
    "torchtitan": {
        "learning rate": "optimizer.lr",
        "warm-up": "lr_scheduler.warmup_steps",
        "clip the gradient norm": "training.max_norm",
    },
    "MaxText": {
        "learning rate": "learning_rate",
        "warm-up": "warmup_steps_fraction",
        "clip the gradient norm": "gradient_clipping_threshold",
        "weight decay": "adam_weight_decay",
        "(β₂)": "adam_b2",
    },
    "OLMo": {
        "learning rate": "optimizer.learning_rate",
        "warm-up": "scheduler.t_warmup",
        "clip the gradient norm": "max_grad_norm",
        "weight decay": "optimizer.weight_decay",
    },
}


def spelled(advice: str, trainer: str) -> str:
    """The advice, with the name of the setting that it is about."""
    for phrase, setting in _SETTINGS.get(trainer, {}).items():
        if phrase in advice:
            return f"{advice} ({setting})"
    return advice


def is_ours(trainer: str) -> bool:
    """Whether the run was made with this library."""
    return trainer == "optax_stability"
