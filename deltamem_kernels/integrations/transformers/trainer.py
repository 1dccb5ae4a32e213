"""`MemoryCheckpoint`: a callback that makes transformers' Trainer checkpoint only what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from .adapter import save_adapter
from .layers import memory_layers
from .states import write_safetensors


class MemoryCheckpoint(TrainerCallback):
    """Callback of a transformers Trainer: write the memory to each checkpoint, not the frozen backbone::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[MemoryCheckpoint()])
        trainer.train(resume_from_checkpoint=True)

    Each `checkpoint-N` folder then holds the adapter, for `load_adapter`, and a model.safetensors with the memory and
    all other parameters that require a gradient, such as LoRA weights. The Trainer resumes from it, and writes and
    reads the states of optimizer, scheduler and random numbers as usual. Attach the same memory before resuming.
    `save_total_limit` and `load_best_model_at_end` work as usual.

    From the creation of the Trainer to the end of training, the callback replaces `save_pretrained` of the model for
    folders named `checkpoint-*`, and checks each `load_state_dict` of the model for the trained weights. Other folders
    get the whole model. An interrupted training leaves both in place.

    Raises:
        ValueError: when the Trainer is created, if the model has no memory, or with FSDP or DeepSpeed, which write
            checkpoints in another way.
        RuntimeError: in resuming, if the checkpoint lacks weights that are trained, or has others.
    """

    def __init__(self) -> None:
        self._load_check: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._install(args, kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._install(args, kwargs["model"])  # again if an earlier training has ended, or after trainer.add_callback

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The Trainer has loaded the best weights, but not of a PEFT model, where it looks for PEFT's own file.
            best = load_file(Path(state.best_model_checkpoint) / SAFE_WEIGHTS_NAME)
            model.load_state_dict(best, strict=False)
        self._load_check.remove()
        self._load_check = None
        model.__dict__.pop("save_pretrained", None)

    def _install(self, args: Any, model: Any) -> None:
        if not memory_layers(model):
            raise ValueError("the model has no memory: call attach_memory before the Trainer is created")
        if args.deepspeed or args.fsdp:
            raise ValueError("MemoryCheckpoint does not support FSDP and DeepSpeed: remove them or the callback")
        if self._load_check is not None and "save_pretrained" in model.__dict__:
            return
        if self._load_check is not None:  # another Trainer of this model has ended
            self._load_check.remove()
        self._load_check = model.register_load_state_dict_post_hook(_check_loaded)
        save_whole = model.save_pretrained

        def save_pretrained(save_directory: Any, *more: Any, is_main_process: bool = True, **options: Any) -> Any:
            folder = Path(save_directory)
            if not folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
                return save_whole(save_directory, *more, is_main_process=is_main_process, **options)
            if is_main_process:
                save_adapter(model, folder)
                write_safetensors(_trained_weights(model), folder / SAFE_WEIGHTS_NAME, {"format": "pt"})
            return None

        model.save_pretrained = save_pretrained


def _trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require a gradient and all of the memory."""
    memory = {id(weight) for _, attention in memory_layers(model) for weight in attention.delta_memory.parameters()}
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad or id(weight) in memory}


def _check_loaded(model: nn.Module, incompatible: Any) -> None:
    """Hook of `load_state_dict`, which the Trainer calls with strict=False, because the backbone is not in the file."""
    missing = _trained_weights(model).keys() & set(incompatible.missing_keys)
    for what, names in (("lacks", missing), ("also has", incompatible.unexpected_keys)):
        if names:
            raise RuntimeError(
                f"the checkpoint does not fit the model: it {what} {min(names)} ({len(names)} such names). Attach the "
                "memory that was trained before resuming"
            )
