"""The same job through kronfluence (Apache-2.0, github.com/pomonam/kronfluence), when it is installed."""

import torch
from torch import nn
from torch.nn import functional as F


def kronfluence_available() -> bool:
    """Whether the package can be imported."""
    try:
        import kronfluence.factor.covariance  # noqa: F401
    except ImportError:
        return False
    return True


def prepare(model: nn.Module, names: list[str]):
    """Wraps the tracked layers of a model (it replaces them), and returns the task."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.task import Task

    class LanguageModeling(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
            return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return names

    task = LanguageModeling()
    device = next(model.parameters()).device
    return prepare_model(model, task).to(device), task  # its own tensors begin on the CPU


def kronfluence_factors(model: nn.Module, task, batches: list[dict], dtype: torch.dtype) -> dict:
    """Sums of A and G by module name, empirical Fisher (gold labels)."""
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.utils.state import State

    arguments = FactorArguments(strategy="kfac", use_empirical_fisher=True)
    arguments.activation_covariance_dtype = arguments.gradient_covariance_dtype = torch.float32
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    _, factors = fit_covariance_matrices_with_loader(
        model, State(cpu=not torch.cuda.is_available()), task, loader, arguments, disable_tqdm=True
    )
    return factors
