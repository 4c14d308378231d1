"""The same job through bergson (MIT, github.com/EleutherAI/bergson), when it is installed."""

import torch
from torch import nn


def bergson_available() -> bool:
    """Whether the package can be imported."""
    try:
        import bergson.hessians.kfac  # noqa: F401
    except ImportError:
        return False
    return True


def bergson_factors(model: nn.Module, names: list[str], batches: list[dict]) -> dict:
    """Sums of A and G by module name and side, empirical Fisher (gold labels), float32 covariances.

    Its collector and its forward and backward pass, as its pipeline sets them up (parameters frozen but for the
    embeddings); without that pipeline's files, which would only add to the time.
    """
    from bergson.collector.collector import fwd_bwd_hessian_factory
    from bergson.config import HessianConfig, IndexConfig
    from bergson.hessians.kfac import CovarianceCollector

    class InMemory(CovarianceCollector):
        def teardown(self) -> None:
            """Leaves the sums where they are."""

    base = model.base_model
    inner = {name for name, _ in base.named_modules()}
    chosen = {name.removeprefix(f"{model.base_model_prefix}.") for name in names}
    if absent := chosen - inner:
        raise ValueError(f"{model.base_model_prefix} has no module {sorted(absent)[0]}")
    model.get_input_embeddings().requires_grad_(True)
    collector = InMemory(model=base, target_modules=chosen, dtype=torch.float32, path="")
    config = HessianConfig(method="kfac", hessian_dtype="fp32", use_dataset_labels=True)
    run = fwd_bwd_hessian_factory(IndexConfig(run_path=""), config)
    for batch in batches:
        ids = batch["input_ids"]
        counted = torch.ones_like(ids, dtype=torch.bool)
        counted[:, -1] = False
        with collector.with_batch(counted):
            run(model, ids, ids, batch)
    sums = {"A": collector.A_cov_dict, "G": collector.S_cov_dict}
    return {
        name: {side: of[name.removeprefix(f"{model.base_model_prefix}.")] for side, of in sums.items()}
        for name in names
    }
