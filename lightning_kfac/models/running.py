"""Which modules text runs through: not a vision tower, cross-attention without anything to attend to, a spare head."""

from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightning_kfac.models.language import NEEDED

_known: WeakKeyDictionary[nn.Module, frozenset[nn.Module] | None] = WeakKeyDictionary()


def modules_of_text(model: nn.Module) -> frozenset[nn.Module] | None:
    """The modules whose forward is called for a text, found on two tokens, once a model.

    Returns:
        None where the model is not a language model, or cannot be run as it is.
    """
    if model not in _known:
        _known[model] = _run(model) if all(hasattr(model, name) for name in NEEDED) else None
    return _known[model]


def _run(model: nn.Module) -> frozenset[nn.Module] | None:
    seen: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda module, args: seen.add(module)) for m in model.modules()]
    training = [module for module in model.modules() if module.training]
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            model.eval()(input_ids=ids, use_cache=False)
    except Exception:  # whatever stops it will be said where the text is run
        return None
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return frozenset(seen)
