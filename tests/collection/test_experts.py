"""Factors of each expert of a mixture, against one ``nn.Linear`` an expert in float64."""

import copy

import pytest
import torch
from torch import nn

from lightning_kfac import InputError, collect_factors
from lightning_kfac.collection.collect import collect_moments
from lightning_kfac.models.targets import resolve_targets
from tests.common import batched, build_model, generator, relative_error
from tests.mixtures import MIXTURES, build_mixture, expert_factors, expert_pairs, projections

LENGTHS = (9, 5, 2, 7)


def rows(lengths=LENGTHS, vocab=61):
    return [torch.randint(1, vocab, (n,), generator=generator(n)).tolist() for n in lengths]


@pytest.mark.parametrize("family", MIXTURES)
def test_against_one_linear_an_expert(family):
    model = build_mixture(family)
    text = rows()
    oracle = expert_factors(copy.deepcopy(model), text)
    for side in ("right", "left"):
        found = collect_factors(model, batched(text, 3, side), projections=projections(family), labels="gold")
        assert set(found) == set(oracle)
        for name, (A, G, n) in oracle.items():
            assert found[name].n_tokens == n, name
            if n == 0:
                assert not found[name].A.any() and not found[name].G.any()
                continue
            # float32 sums; routing weights and activations in between
            assert relative_error(found[name].A, A / n) < 1e-5, name
            assert relative_error(found[name].G, G / n) < 1e-5, name
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "qwen2_moe"])
def test_counts_of_a_projection_add_up(family):
    model = build_mixture(family)
    found = collect_factors(model, batched(rows(), 2), projections=["expert_gate", "expert_down"])
    counted = sum(n - 1 for n in LENGTHS)
    for block in MIXTURES[family][1]:
        for leaf in (".gate", "down_proj"):
            of = [f.n_tokens for name, f in found.items() if f".layers.{block}." in name and leaf in name]
            assert len(of) == 4 and sum(of) == 2 * counted


def test_gate_and_up_share_their_input():
    found = collect_factors(build_mixture("olmoe"), batched(rows(), 2), projections=["expert_gate", "expert_up"])
    for name, factors in found.items():
        assert factors.A is found[name.replace(".up", ".gate")].A


def test_batching_and_passes_change_nothing():
    model = build_mixture("olmoe")
    whole = collect_factors(model, batched(rows(), 4), projections=["expert_up", "expert_down"])
    for settings in ({"layers_per_pass": 3}, {"max_memory_gb": 0.0013}):
        cut = collect_factors(model, batched(rows(), 1), projections=["expert_up", "expert_down"], **settings)
        for name, factors in whole.items():
            assert cut[name].n_tokens == factors.n_tokens
            assert relative_error(cut[name].G, factors.G) < 5e-6 or not factors.n_tokens


def test_one_expert_is_a_dense_layer():
    """With one expert, whose routing weight is 1, the mixture is a dense model: same factors."""
    mixture = build_mixture("mixtral", num_local_experts=1, num_experts_per_tok=1)
    same = {key: getattr(mixture.config, key) for key in ("rope_parameters", "rms_norm_eps")}
    dense = build_model("llama", num_key_value_heads=2, num_attention_heads=2, num_hidden_layers=2, **same)
    state = {k: v for k, v in mixture.state_dict().items() if ".mlp." not in k}
    for block in range(2):
        experts = mixture.model.layers[block].mlp.experts
        gate, up = experts.gate_up_proj[0].chunk(2)
        state |= {
            f"model.layers.{block}.mlp.gate_proj.weight": gate,
            f"model.layers.{block}.mlp.up_proj.weight": up,
            f"model.layers.{block}.mlp.down_proj.weight": experts.down_proj[0],
        }
    dense.load_state_dict(state)
    batches = batched(rows(), 2)
    found = collect_factors(mixture, batches, projections=["expert_gate", "expert_up", "expert_down"])
    expected = collect_factors(dense, batches)
    for name, factors in expected.items():
        prefix, _, leaf = name.rpartition(".")
        key = {"gate_proj": "gate_up_proj.0.gate", "up_proj": "gate_up_proj.0.up", "down_proj": "down_proj.0"}[leaf]
        theirs = found[f"{prefix}.experts.{key}"]
        assert theirs.n_tokens == factors.n_tokens
        assert relative_error(theirs.A, factors.A) < 1e-5 and relative_error(theirs.G, factors.G) < 1e-5


@pytest.mark.parametrize("lengths", [LENGTHS, (6, 6, 6)])
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_moments_of_experts(kind, lengths):
    """Squares of all components of a gradient add up to those of the weight's gradient, in any basis."""
    model = build_mixture("olmoe")
    names = [r"model\.layers\.1\.mlp\.experts\.down_proj\.\d"]
    factors = collect_factors(model, batched(rows(lengths), 2), modules=names, labels="gold")
    found = collect_moments(model, batched(rows(lengths), 2), factors, moments=kind, labels="gold")
    assert found
    if kind == "sequence":
        for name, moments in found.items():
            expected = sum(squared_gradients(model, name, row) for row in rows(lengths))
            assert moments.double().sum().item() * factors[name].n_tokens == pytest.approx(expected, rel=1e-5)
        return
    sums = {}
    model = model.double()
    for name, pairs in expert_pairs(model, rows(lengths)).items():
        sums[name] = sum((a.square().sum() * g.square().sum()).item() for a, g in pairs)
    for name, moments in found.items():
        assert moments.double().sum().item() * factors[name].n_tokens == pytest.approx(sums[name], rel=1e-5)


def squared_gradients(model, name, row):
    """||d loss / d W||^2 of one row by autograd."""
    parameter = model.get_parameter(name.rpartition(".")[0])
    model.requires_grad_(False)
    parameter.requires_grad_(True)
    logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].double()
    loss = -logits[:-1].log_softmax(-1)[torch.arange(len(row) - 1), torch.tensor(row[1:])].sum()
    (gradient,) = torch.autograd.grad(loss, parameter)
    return gradient[int(name.rpartition(".")[2])].double().square().sum().item()


def test_a_layer_is_watched_only_while_it_is_collected():
    model = build_mixture("olmoe")
    ids = torch.tensor(rows((8,)))
    before = model(input_ids=ids).logits
    layer = resolve_targets(model, [0], ["expert_down"])["model.layers.0.mlp.experts.down_proj.2"]
    handles = [layer.watch(lambda a, z, positions=None: None) for _ in range(2)]
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
    for handle in handles:
        assert "forward" in layer.module.__dict__
        handle.remove()
    assert "forward" not in layer.module.__dict__
    assert torch.equal(model(input_ids=ids).logits, before)


def test_wrong_projections_of_a_mixture():
    model = build_mixture("qwen2_moe")
    message = r"block 0 has no projection 'gate'; it has expert_down, .*shared_up.*choose `expert_gate`"
    with pytest.raises(InputError, match=message):
        collect_factors(model, batched(rows(), 2))
    shared = resolve_targets(model, "all", ["shared_gate", "shared_up", "shared_down"])
    assert len(shared) == 6 and all(".shared_expert." in name for name in shared)


def test_wrong_dense_blocks_alone_of_a_mixture():
    model = build_mixture("deepseek_v3")
    with pytest.raises(InputError, match=r"block 1 has no projection 'gate'; it has expert_down.*`expert_gate`"):
        resolve_targets(model)
    dense = resolve_targets(model, [0])
    assert list(dense) == [f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")]
    both = resolve_targets(model, "all", ["gate", "expert_gate"])
    assert len(both) == 1 + 4
    assert len(resolve_targets(model, "all", ["expert_gate", "shared_gate"])) == 4 + 1
    with pytest.raises(InputError, match="block 0 has no projection 'expert_gate'"):
        resolve_targets(model, [0], ["expert_gate"])


def test_wrong_experts_over_processes():
    model = build_mixture("olmoe")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts: its experts are spread over processes"):
        collect_factors(model, batched(rows(), 2), blocks=[0], projections=["expert_up"])


def test_wrong_experts_that_are_not_known():
    model = build_mixture("olmoe")

    class Mine(nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.w = experts.gate_up_proj
            self.v = experts.down_proj
            self.inner = [experts]

        def forward(self, *args):
            return self.inner[0](*args)

    model.model.layers[0].mlp.experts = Mine(model.model.layers[0].mlp.experts)
    with pytest.raises(InputError, match=r"mlp\.experts holds its experts in a way that is not known here"):
        resolve_targets(model, [0], ["up"])
