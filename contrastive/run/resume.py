"""What a resumed run may change of its configuration."""

from contrastive.run.config import RunConfig
from contrastive.run.config_file import flatten
from data.errors import UsageError

# What a resume may change: neither the model, nor the loss, nor the order of the data.
CHANGEABLE = {
    "data.num_workers", "data.features", "data.on_error", "data.index_dir", "data.max_pixels",
    "zero.offload", "zero.micro_batch_size", "log_every", "eval_every", "eval_data",
    "eval_patch_sizes", "val_shards", "val_samples", "checkpoint_every", "keep_checkpoints",
    "steps",  # at least those done: `find_checkpoint`
    "compile", "deepspeed_config",
}  # fmt: skip


def check_resumable(saved: RunConfig, asked: RunConfig) -> None:
    """Refuse a resume that would alter the model, the loss or the order of the data."""
    before, after = flatten(saved), flatten(asked)
    for name, value in after.items():
        if name not in CHANGEABLE and value != before[name]:
            raise UsageError(
                f"{name}={value} cannot change on resume: the run was started with {before[name]}"
            )
