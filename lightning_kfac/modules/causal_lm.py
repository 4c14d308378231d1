"""The LightningModule: a causal language model, frozen for collection or trained in the ordinary way."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from typing_extensions import Self, override

from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.collection.objective import Runs
from lightning_kfac.distributed.lockstep import Lockstep
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.bulk import BulkShare
from lightning_kfac.factors.folder import load_factors
from lightning_kfac.metrics.described import Measures
from lightning_kfac.mining.scores import Scores
from lightning_kfac.mining.search import Looked, search
from lightning_kfac.models.language import most_positions
from lightning_kfac.models.loading import Dtype, end_of_text_ids, load_config, load_model
from lightning_kfac.models.sharded_loading import load_sharded
from lightning_kfac.models.source import ModelSource
from lightning_kfac.models.tokens import TokenBatch
from lightning_kfac.modules.evaluating import EvaluatedLM
from lightning_kfac.modules.optimizers import TRAINED_BY, NoOptimizer, training_optimizers
from lightning_kfac.modules.text_data import text_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Training:
    """Ordinary language-model training: of a demo model, or to plant text in a pretrained one.

    Args:
        lr: Peak learning rate, cosine to 10 %.
        weight_decay: Of matrices that are no embeddings.
        warmup: Steps of linear warm-up.
        optimizer: ``muon`` for matrices beside AdamW for the rest, or ``adamw`` for all, which costs less a step.
    """

    lr: float = 4e-3
    weight_decay: float = 0.1
    warmup: int = 20
    optimizer: Literal["muon", "adamw"] = "muon"


class CausalLM(EvaluatedLM):
    """Loss and evaluation of a causal language model.

    Without ``training`` every parameter is frozen and ``fit`` is a curvature collection: the loss is
    the summed cross-entropy over valid positions, the optimizer does nothing, and no weight changes.

    Args:
        model_name: Hub name, local folder, or ``demo`` for the embedded model; ``NAME@REVISION`` names a revision too.
        architecture: Instead of a name: a model config with ``model_type``; weights start random.
        dtype: Of the weights; ``auto`` is the checkpoint's own (float16 is computed in float32 and written as float16).
        labels: ``sampled`` from the model's predictions (true Fisher), or ``gold`` from the corpus
            (empirical Fisher).
        mc_samples: Draws of labels a forward pass.
        seed: Keys the sampled labels and random initial weights.
        reference: The unedited model that ``validate`` compares with; by default the one that ``edit.json`` names.
        skip_baseline: Do not evaluate the unedited model: no nDCG and no differences.
        measures: What else to measure, and the threshold of loose recitation.
        training: Train the model instead of collecting curvature.
        trust_remote_code: Let the model's repository run its own code.
        revision: Branch, tag or commit of a hub model.
        gguf_file: A GGUF file in the model's folder or repository; its weights are dequantized.
        adapter: Folder or hub name of an adapter (peft) that is merged into the weights.

    Attributes:
        source: Where the model comes from; None where it is described by ``architecture``.
        collection: What runs a batch of a collection; set by ``CurvatureCollector``.
    """

    def __init__(
        self,
        model_name: str | None = None,
        architecture: dict[str, Any] | None = None,
        dtype: Dtype = "auto",
        labels: Literal["sampled", "gold"] = "sampled",
        mc_samples: int = 1,
        seed: int = 0,
        reference: str | None = None,
        skip_baseline: bool = False,
        measures: Measures = Measures(),  # noqa: B008 (frozen)
        training: Training | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        gguf_file: str | None = None,
        adapter: str | None = None,
    ):
        super().__init__(measures)
        if seed < 0:
            raise InputError(f"the seed must not be negative, got {seed}")
        self.source: ModelSource | None = None
        if model_name is not None:
            self.source = ModelSource.named(model_name, revision, gguf_file, adapter, trust_remote_code)
        self.model_name = None if self.source is None else self.source.name
        self.evaluated = self.source
        self.architecture = architecture
        self.dtype_name = dtype
        self.labels = labels
        self.seed = seed
        self.reference = reference
        self.skip_baseline = skip_baseline
        self.training_settings = training
        self.objective = FisherLoss(labels, seed, mc_samples)
        self.trust_remote_code = trust_remote_code
        self.config = load_config(self.source, architecture)
        self.collection: Runs | None = None
        self._bulk: BulkShare | None = None
        self.strict_loading = training is not None  # the checkpoint of a collection has no weights
        if training is not None:
            self.stage = "trained"

    # -- the model -----------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model's embedding takes."""
        return self.config.get_text_config().vocab_size

    @property
    def max_positions(self) -> int | None:
        """Longest row that the model takes; None where the config names no limit."""
        return most_positions(self.config.get_text_config())

    @property
    def frozen(self) -> bool:
        """True for a collection, False for training."""
        return self.training_settings is None

    @override
    def configure_model(self) -> None:
        """Loads the weights (Lightning calls this in every process, after the data are there)."""
        if self.model is None:
            torch.manual_seed(self.seed)
            self.model = self._load()
            self.lockstep = None if self.device_mesh is None else Lockstep(self.model)
            self.model.requires_grad_(not self.frozen)
            self.model.train(not self.frozen)

    def _load(self) -> "PreTrainedModel":
        if self.device_mesh is None:
            return load_model(self.evaluated, self.dtype_name, architecture=self.architecture)
        return load_sharded(
            self.device_mesh["data_parallel"],
            self.trainer.strategy.root_device,
            self.evaluated,
            self.dtype_name,
            architecture=self.architecture,
        )

    def turn_to(self, stage: str, source: ModelSource | str | None) -> None:
        """Has another model loaded and evaluated next."""
        self.stage = stage
        self.evaluated = None if source is None else ModelSource.named(source)
        self.model = None

    @override
    def train(self, mode: bool = True) -> Self:
        """Keeps a frozen model in eval mode: dropout would change its curvature."""
        super().train(mode)
        if self.frozen and self.model is not None:
            self.model.eval()
        return self

    def about(self) -> dict[str, Any]:
        """What metadata of factors says of the model and the objective."""
        return {**({} if self.source is None else self.source.about()), "labels": self.labels, "seed": self.seed}

    # -- fit -----------------------------------------------------------------------------------------

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Makes a batch of tokens, with the numbers that draw labels, while it is still on the CPU."""
        if not isinstance(batch, dict) or "input_ids" not in batch:
            return batch
        collecting = self.frozen and self.trainer.training
        return self.objective.prepare(batch) if collecting else TokenBatch.from_dict(batch)

    @override
    def training_step(self, tokens: TokenBatch, batch_idx: int) -> Tensor:
        """One batch: of a collection, up to its last backward; or of a training, the mean loss."""
        n_tokens = tokens.valid.sum().clamp(min=1)
        if self.frozen:
            collection = self._running_collection
            loss = collection.run(tokens)
            self.log("collect/loss_per_token", collection.loss / n_tokens)
            return loss
        loss = torch.stack([part.gold_loss(self.loaded) for part in tokens.by_length()]).sum() / n_tokens
        self.log("train/loss", loss.detach())
        return loss

    @property
    def _running_collection(self) -> Runs:
        if self.collection is None:
            raise InputError("the collection has not begun: CurvatureCollector must be among trainer.callbacks")
        return self.collection

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Nothing to optimize in a collection; Muon and AdamW, or AdamW alone, in training."""
        settings = self.training_settings
        if settings is None:
            return NoOptimizer()
        steps = int(self.trainer.estimated_stepping_batches)
        kind = TRAINED_BY[settings.optimizer]
        return training_optimizers(kind(self.loaded, settings.lr, settings.weight_decay), settings.warmup, steps)

    # -- mining --------------------------------------------------------------------------------------

    @override
    def on_predict_start(self) -> None:
        super().on_predict_start()
        factors = text_data(self.trainer).mining.factors
        self._bulk = None if factors is None else BulkShare(self.loaded, load_factors(factors), control=False)

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Looked:
        """The windows of a batch of pieces that the model recites word for word, and how likely each is drawn."""
        data = text_data(self.trainer)
        prefix_len, suffix_len = data.window
        scheme = self.measures.extraction
        scores = None if scheme is None else Scores(scheme)
        with self.lockstep or nullcontext():
            searched = search(
                self.loaded,
                batch["pieces"],
                prefix_len,
                suffix_len,
                likely=None if data.mining.exhaustive else data.mining.likely,
                batch_size=data.eval_batch_size,
                end_of_text=end_of_text_ids(self.loaded),
                max_positions=self.max_positions,
                bulk=self._bulk,
                least_bulk=data.mining.bulk_share or 0.0,
                scores=scores,
            )
        return Looked(searched, scores)
