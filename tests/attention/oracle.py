"""Crystallized attention the slow way: float64, one row at a time, every sum written out."""

import torch
from transformers import AutoModelForCausalLM


class AttentionOracle:
    """One unpadded row at a time in float64: the model's own probabilities, and every sum written out.

    Layers are crystallized one after the other by replacing the input of the output projection.
    """

    def __init__(self, model):
        self.model = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").double().eval()
        self.model.load_state_dict(model.state_dict())
        self.blocks = getattr(self.model.base_model, "layers", None) or self.model.base_model.h

    def layer(self, layer, row, replaced):
        """Probabilities [H, T, S], values [K, S, d] and outputs [T, H, d] of one layer."""
        seen = {}
        attention = self._attention(layer)
        source = attention.c_attn if hasattr(attention, "c_attn") else attention.v_proj
        handle = source.register_forward_hook(lambda m, args, out: seen.update(v=out[0].detach()))
        p = self.logits(row, replaced, output_attentions=True).attentions[layer][0]
        handle.remove()
        v, width = seen["v"], attention.head_dim
        v = v[:, -p.shape[0] * width :] if hasattr(attention, "c_attn") else v
        v = v.view(len(row), -1, width).transpose(0, 1)
        out = torch.zeros(len(row), p.shape[0], width, dtype=torch.float64)
        for h in range(p.shape[0]):
            for t in range(len(row)):
                for i in range(len(row)):
                    out[t, h] += p[h, t, i] * v[h * len(v) // p.shape[0], i]
        return p, v, out

    def split(self, layer, row, replaced=None):
        """Ground states and residuals [T, H, d]."""
        p, v, out = self.layer(layer, row, replaced or {})
        ground = torch.zeros_like(out)
        for h in range(p.shape[0]):
            for t in range(len(row)):
                best = max(range(len(row)), key=lambda i: (p[h, t, i].item(), -i))
                ground[t, h] = v[h * len(v) // p.shape[0], best]
        return ground, out - ground

    def crystallized(self, row, layers, mode, rank=None, directions=None):
        """Logits [T, V]; ``directions`` [H, d, d] by layer."""
        replaced = {}
        for layer in layers:
            ground, eps = self.split(layer, row, replaced)
            kept = torch.zeros_like(eps)
            for t, h in torch.cartesian_prod(torch.arange(eps.shape[0]), torch.arange(eps.shape[1])).tolist():
                for r in range(rank or 0):
                    direction = directions[layer][h][:, r]
                    kept[t, h] += (eps[t, h] @ direction) * direction
            replaced[layer] = ground + (eps if mode == "full" else kept)
        return self.logits(row, replaced).logits[0]

    @torch.no_grad()
    def logits(self, row, replaced, **options):
        handles = []
        for layer, heads in replaced.items():
            attention = self._attention(layer)
            projection = attention.c_proj if hasattr(attention, "c_proj") else attention.o_proj
            handles.append(projection.register_forward_pre_hook(lambda m, args, heads=heads: (heads.flatten(1)[None],)))
        output = self.model(input_ids=torch.tensor([row]), use_cache=False, **options)
        for handle in handles:
            handle.remove()
        return output

    def _attention(self, layer):
        block = self.blocks[layer]
        return block.attn if hasattr(block, "attn") else block.self_attn
