"""Relearning as training: an edited model learns something, and is measured on its way."""

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from lightning_kfac.attacks.attack import attacked_layers
from lightning_kfac.attacks.relearning import Relearning
from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.errors import InputError
from lightning_kfac.models.adapters import check_peft
from lightning_kfac.models.experts import ExpertLayer
from lightning_kfac.modules.sequence_training import SequenceTraining, in_float32

LORA_SCALE = 2


class RelearningLM(SequenceTraining):
    """A copy of an edited model that learns sequences; the model itself is left as it is.

    All weights are trained in float32, and measured in the dtypes that they had; adapters in float32 on weights as
    they are.

    Args:
        edited: The model.
        sequences: What is learned; none of those that are reported.
        attack: How.

    Raises:
        InputError: The model is quantized, or adapters are asked for and peft is not there.

    Example:
        >>> from lightning import Trainer
        >>> from lightning_kfac.loading import load_model
        >>> module = RelearningLM(load_model("demo"), [MemorizedSequence([5, 6], [7, 8])], Relearning(steps=(2,)))
        >>> trainer = Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(module)
        >>> module.losses[1] < module.losses[0]
        True
    """

    def __init__(self, edited: nn.Module, sequences: Sequence[MemorizedSequence], attack: Relearning):
        layers = attacked_layers(edited)
        model = copy.deepcopy(edited).requires_grad_(True)
        dtypes: dict[str, torch.dtype] = {}
        if attack.weights == "lora":
            model = _with_adapters(model, [n for n, x in layers.items() if not isinstance(x, ExpertLayer)], attack)
        else:
            dtypes = in_float32(model)
        super().__init__(
            model,
            sequences,
            steps=max(attack.steps),
            batch_size=attack.batch_size,
            optimizer=attack.optimizer,
            lr=attack.lr,
            seed=attack.seed,
        )
        self.dtypes = dtypes


def _with_adapters(model: nn.Module, names: list[str], attack: Relearning) -> nn.Module:
    """A model in peft's wrapper, with an adapter at each of the layers; only these are trained."""
    if not names:
        raise InputError("attacks: relearning: weights lora: the model has only experts, which adapters do not reach")
    check_peft("attacks: relearning: weights lora")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=attack.rank, lora_alpha=LORA_SCALE * attack.rank, target_modules=names)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what peft asks transformers
        torch.manual_seed(attack.seed)
        wrapped: nn.Module = get_peft_model(model, config)
    return wrapped
