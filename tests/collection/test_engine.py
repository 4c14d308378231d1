"""The engine: everything that makes it fast or general must leave the factors as they are."""

import copy
import io
import math

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_kfac import InputError, collect_factors
from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.collect import collect_moments, frozen
from lightning_kfac.collection.engine import CurvatureEngine
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.collection.memory import plan_memory
from lightning_kfac.math.spectrum import eigenbasis
from lightning_kfac.models.probes import is_plain_head
from lightning_kfac.models.targets import resolve_targets
from lightning_kfac.reporting.tables import Example, examples_markdown, examples_table
from tests.common import TOLERANCE, assert_same, batched, build_model, padded, projections_of, relative_error
from tests.oracle import one_row_factors


def run_engine(model, batch, loss, layers, **settings):
    with frozen(model), CurvatureCapture(layers) as capture:
        last, total = CurvatureEngine(model, capture, loss, **settings).run(loss.prepare(batch))
        last.backward()
        return capture.results(loss.mc_samples), total.item()


# -- cuts ------------------------------


@pytest.mark.parametrize("labels", ["gold", "sampled"])
@pytest.mark.parametrize("settings", [{"head_chunk": 1}, {"head_chunk": 7}, {"rows_at_once": 2, "head_chunk": 1000}])
def test_slices_change_nothing(any_model, rows, labels, settings):
    layers = resolve_targets(any_model, projections=projections_of(any_model))
    loss = FisherLoss(labels, seed=3)
    whole, total = run_engine(any_model, padded(rows), loss, layers)
    sliced, sliced_total = run_engine(any_model, padded(rows), loss, layers, **settings)
    assert_same(sliced, whole, 2e-6)
    assert sliced_total == pytest.approx(total, rel=1e-6)


def test_dense_batches_equal_masked_ones(any_model, rows):
    ids = torch.tensor([rows[0], rows[2], rows[5]])
    settings = {"projections": projections_of(any_model)}
    masked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert_same(
        collect_factors(any_model, [{"input_ids": ids}], **settings), collect_factors(any_model, [masked], **settings)
    )


def test_tracked_head_and_capped_logits_take_the_whole_logits(rows):
    model = build_model("llama", tie_word_embeddings=False)
    assert is_plain_head(model)
    found = collect_factors(model, batched(rows, 3), modules=["lm_head"], labels="gold")
    expected = one_row_factors(copy.deepcopy(model), ["lm_head"], rows, [row[1:] for row in rows])["lm_head"]
    assert relative_error(found["lm_head"].G, expected[1]) < TOLERANCE
    settings = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 2, "head_dim": 12, "vocab_size": 61, "pad_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    gemma = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **settings)).eval()
    gemma.lm_head.weight.data.mul_(50)  # so that the cap matters
    assert not is_plain_head(gemma)
    found = collect_factors(gemma, batched(rows, 3), labels="gold")
    expected = one_row_factors(copy.deepcopy(gemma), list(found), rows, [row[1:] for row in rows])
    for name, (A, G, _) in expected.items():
        assert relative_error(found[name].A, A) < TOLERANCE and relative_error(found[name].G, G) < TOLERANCE


@pytest.mark.parametrize("family", ["opt", "falcon"])
def test_models_that_flatten_or_write_in_place(family, rows):
    """OPT hands rows and positions to its MLP as one dimension; Falcon adds to outputs in place."""
    settings = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 61,
        "pad_token_id": 0,
    }
    settings |= {"ffn_dim": 40, "word_embed_proj_dim": 24, "max_position_embeddings": 64} if family == "opt" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    names = [r".*fc[12]"] if family == "opt" else [r".*mlp\.dense.*"]
    alone = collect_factors(model, [{"input_ids": torch.tensor([row])} for row in rows], modules=names, labels="gold")
    together = collect_factors(model, batched(rows, 3), modules=names, labels="gold")
    expected = one_row_factors(copy.deepcopy(model), list(alone), rows, [row[1:] for row in rows])
    assert_same(together, alone)
    for name, (A, G, n) in expected.items():
        assert alone[name].n_tokens == n
        assert relative_error(alone[name].A, A.reshape(len(A), -1)) < TOLERANCE
        assert relative_error(alone[name].G, G) < TOLERANCE


# -- other ways to run a model ------------------------------


def test_attention_implementations_agree(rows):
    model = build_model("llama")
    model.set_attn_implementation("sdpa")
    sdpa = collect_factors(model, batched(rows, 3), labels="gold")
    model.set_attn_implementation("eager")
    assert_same(collect_factors(model, batched(rows, 3), labels="gold"), sdpa)


def test_gradient_checkpointing_changes_nothing(rows):
    model = build_model("olmo2")
    plain = collect_factors(model, batched(rows, 3), labels="gold")
    layers = resolve_targets(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.requires_grad_(False).train()  # it is inactive in eval mode; OLMo-2 has no dropout
    with CurvatureCapture(layers) as capture:
        for batch in batched(rows, 3):
            loss = FisherLoss("gold")
            last, _ = CurvatureEngine(model, capture, loss).run(loss.prepare(batch))
            last.backward()
        found = capture.results()
    assert_same(found, plain)


@pytest.mark.filterwarnings("ignore")
def test_compiled_models_give_the_same_factors(rows):
    model = build_model("olmo2", num_hidden_layers=2)
    plain = collect_factors(model, batched(rows, 7), labels="gold")
    model.compile(backend="aot_eager")  # tracing and autograd of torch.compile, without a C++ compiler
    assert_same(collect_factors(model, batched(rows, 7), labels="gold"), plain)


# -- Monte Carlo ------------------------------


def exact_fisher_G(model, name, row):
    """Every class of every position, weighted by its probability; labels of other positions are independent.

    g_t is a sum over positions s of J_ts (p_s - e_{y_s}); with independent y_s the cross terms vanish.
    """
    layer, seen = model.get_submodule(name), {}
    handle = layer.register_forward_hook(lambda m, a, o: (o.requires_grad_(True), seen.update(o=o))[0])
    logits = model(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)
    handle.remove()
    G = 0
    for s in range(len(logits)):
        probabilities = logits[s].detach().exp()
        for k in range(logits.shape[-1]):
            (g,) = torch.autograd.grad(-logits[s, k], seen["o"], retain_graph=True)
            g = g[0, :-1]
            G = G + probabilities[k] * (g.T @ g)
    return G / len(logits)


def test_monte_carlo_factors_converge_to_the_exact_fisher():
    """The error falls like 1 / sqrt(draws): over 16 times the draws by 4, within a factor of 1.6.

    G is a mean over draws of independent matrices. The ratio of root mean squared errors is estimated
    from 24 seeds each, whose standard error is about 15 %; the seeds are fixed.
    """
    model = build_model("olmo2", vocab_size=11, num_hidden_layers=2).double().requires_grad_(False)
    row, name = [3, 5, 1, 7, 2, 9], "model.layers.1.mlp.up_proj"
    exact = exact_fisher_G(model, name, row)

    def error(draws, seed):
        batch = [{"input_ids": torch.tensor([row])}]
        found = collect_factors(model, batch, modules=[name], seed=seed, mc_samples=draws)[name].G
        return ((found - exact).norm() / exact.norm()).item() ** 2

    few, many = (math.sqrt(sum(error(draws, 100 * draws + s) for s in range(24)) / 24) for draws in (8, 128))
    assert few / many == pytest.approx(4, rel=0.6) and few / many > 4 / 1.6
    assert many < 0.2


def test_several_draws_are_the_mean_of_single_ones(rows):
    model, layers = build_model("olmo2"), resolve_targets(build_model("olmo2"))
    layers = resolve_targets(model)
    together, _ = run_engine(model, padded(rows), FisherLoss("sampled", 1, 3), layers, rows_at_once=3)
    tokens = FisherLoss("sampled", 1, 3).prepare(padded(rows))
    singles = []
    for draw in range(3):
        with frozen(model), CurvatureCapture(layers) as capture:
            loss = FisherLoss("sampled", 1)
            one = type(tokens)(**{**vars(tokens), "uniforms": tokens.uniforms[:, draw : draw + 1]})
            last, _ = CurvatureEngine(model, capture, loss).run(one)
            last.backward()
            singles.append(capture.results())
    for name, found in together.items():
        assert found.n_tokens == singles[0][name].n_tokens
        assert relative_error(found.A, singles[0][name].A) < TOLERANCE
        assert relative_error(found.G, sum(s[name].G.double() for s in singles) / 3) < TOLERANCE


# -- EK-FAC moments ------------------------------


@pytest.mark.parametrize("moments", ["token", "sequence"])
def test_moments_are_those_of_brute_force(any_model, rows, moments):
    settings = {"projections": projections_of(any_model), "labels": "gold"}
    factors = collect_factors(any_model, batched(rows, 3), **settings)
    found = collect_moments(any_model, batched(rows, 3), factors, moments=moments, labels="gold")
    model = copy.deepcopy(any_model).double()
    bases = {n: (eigenbasis(f.G).vectors, eigenbasis(f.A).vectors) for n, f in factors.items()}
    expected = {n: 0 for n in factors}
    for row in rows:
        seen, handles = {}, []
        for name in factors:
            layer = model.get_submodule(name)

            def remember(m, a, o, name=name, seen=seen):
                o.retain_grad()
                seen[name] = (a[0].detach()[0], o)

            handles.append(layer.register_forward_hook(remember))
        logits = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        (-sum(logits[t, row[t + 1]] for t in range(len(row) - 1))).backward()
        for handle in handles:
            handle.remove()
        for name, (a, output) in seen.items():
            U_G, U_A = bases[name]
            gradients = [torch.outer(U_G.T @ output.grad[0, t], U_A.T @ a[t]) for t in range(len(row) - 1)]
            expected[name] += sum(g**2 for g in gradients) if moments == "token" else sum(gradients) ** 2
    n = sum(len(row) - 1 for row in rows)
    for name in factors:
        assert relative_error(found[name], expected[name] / n) < 1e-5


# -- a loss of one's own ------------------------------


def test_own_loss_on_a_classifier():
    """An encoder over masked positions and a classifier head with one vector a row."""
    torch.manual_seed(0)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x, mask):
            hidden = torch.tanh(self.encoder(x)) * mask[..., None]
            return self.head(hidden.sum(1) / mask.sum(1, keepdim=True))

    model = Classifier()
    x, y = torch.randn(5, 4, 6), torch.randint(0, 3, (5,))
    mask = torch.tensor([[1, 1, 1, 1]] * 3 + [[1, 1, 0, 0]] * 2)

    def loss_fn(model, batch):
        logits = model(batch["x"], batch["attention_mask"])
        return nn.functional.cross_entropy(logits, batch["y"], reduction="sum")

    batches = [{"x": x[s], "y": y[s], "attention_mask": mask[s]} for s in (slice(0, 2), slice(2, 5))]
    found = collect_factors(model, batches, modules=["encoder", "head"], loss_fn=loss_fn)
    double, A, G, head_G = copy.deepcopy(model).double(), 0, 0, 0
    for i in range(5):
        z = double.encoder(x[i].double()).detach().requires_grad_(True)
        hidden = (torch.tanh(z) * mask[i][:, None]).sum(0) / mask[i].sum()
        logits = double.head(hidden)
        logits.retain_grad()
        nn.functional.cross_entropy(logits, y[i], reduction="sum").backward()
        for t in range(int(mask[i].sum())):
            A = A + torch.outer(x[i, t], x[i, t]).double()
            G = G + torch.outer(z.grad[t], z.grad[t])
        head_G = head_G + torch.outer(logits.grad, logits.grad)
    assert (found["encoder"].n_tokens, found["head"].n_tokens) == (16, 5)
    assert relative_error(found["encoder"].A, A / 16) < TOLERANCE
    assert relative_error(found["encoder"].G, G / 16) < TOLERANCE
    assert relative_error(found["head"].G, head_G / 5) < TOLERANCE


# -- the plan ------------------------------


def test_plan_fits_into_what_it_is_given(rows):
    model = build_model("olmo2")
    layers = resolve_targets(model)
    free = plan_memory(model, layers, FisherLoss(), rows=4, seq_len=32)
    assert len(free.passes) == 1 and len(free.passes[0]) == 9 and free.rows_at_once == 4
    # gate and up share one A: 3 x (G gate, G up, A both, G down, A down), two accumulators each
    assert free.factor_bytes == 3 * 2 * 4 * (40**2 + 40**2 + 24**2 + 24**2 + 40**2)
    row = free.activation_bytes // 4
    cap = (free.factor_bytes // 2 + free.head_bytes + row) / 1e9
    tight = plan_memory(model, layers, FisherLoss(), rows=4, seq_len=32, max_memory_gb=cap)
    assert len(tight.passes) > 1 and sum(map(len, tight.passes)) == 9
    assert tight.factor_bytes + tight.activation_bytes + tight.head_bytes <= cap * 1e9
    assert str(free).startswith("9 projections, 1 pass, 0.1 MB of factors")


def test_passes_do_not_change_the_factors(rows):
    model = build_model("llama")
    batches = batched(rows, 3)
    one = collect_factors(model, batches)
    several = collect_factors(model, batches, layers_per_pass=2)
    assert list(one) == list(several)
    assert_same(several, one, 1e-12)
    with pytest.raises(InputError, match="5 passes are needed: give `batches` as a list"):
        collect_factors(model, iter(batches), layers_per_pass=2)
    assert_same(collect_factors(model, iter(batches)), one, 1e-12)


def test_wrong_memory():
    model = build_model("olmo2")
    with pytest.raises(InputError, match=r"does not fit into 0\.0 MB: .* it needs \d+\.\d MB"):
        plan_memory(model, resolve_targets(model), FisherLoss(), 4, 32, max_memory_gb=1e-6)
    with pytest.raises(InputError, match="layers_per_pass is 0"):
        plan_memory(model, resolve_targets(model), FisherLoss(), 4, 32, layers_per_pass=0)


def test_activation_estimate_is_what_autograd_keeps(rows):
    """The estimate from a few tokens against the memory that a full row really keeps."""
    model = build_model("llama", intermediate_size=400, hidden_size=240).requires_grad_(False)
    layers = resolve_targets(model)
    plan = plan_memory(model, layers, FisherLoss("gold"), rows=1, seq_len=48)
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    loss = FisherLoss("gold")
    with CurvatureCapture(layers) as capture, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        capture.begin(None)
        next(iter(loss.draws(model, loss.prepare({"input_ids": torch.ones(1, 48).long()}), 16)))
    assert sum(kept.values()) <= plan.activation_bytes <= 1.6 * sum(kept.values())


# -- odds and ends ------------------------------


def test_wrong_float16(rows):
    with pytest.raises(InputError, match="is in float16, whose gradients overflow"):
        collect_factors(build_model("olmo2").half(), batched(rows, 3))


def test_wrong_settings():
    with pytest.raises(InputError, match="mc_samples is 2"):
        FisherLoss("gold", mc_samples=2)
    with pytest.raises(InputError, match="mc_samples is 0"):
        FisherLoss("sampled", mc_samples=0)
    with pytest.raises(InputError, match="id 99 is outside the model's vocabulary"):
        collect_factors(build_model("olmo2"), [{"input_ids": torch.tensor([[1, 99]])}])


def test_eigenbasis_falls_back_where_a_solver_fails(monkeypatch):
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    solve, calls = torch.linalg.eigh, []

    def failing(m):
        calls.append(m)
        if len(calls) < 2:
            raise torch.linalg.LinAlgError("no")
        return solve(m)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    assert eigenbasis(matrix).values.tolist() == pytest.approx([3, 2, 1], rel=1e-8)
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (_ for _ in ()).throw(torch.linalg.LinAlgError("no")))
    with pytest.raises(InputError, match="G of fc: its eigendecomposition does not converge"):
        eigenbasis(matrix, "G of fc")


def test_text_with_markup_is_shown_as_it_is():
    text = r"a \[/INST] [bold]b re.sub(r'\[a-z]', x) `*c*` <d>"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(examples_table([Example(text, text, text, text)]))
    assert console.export_text().count(text) == 4
    assert r"\[bold\]b" in examples_markdown([Example(text, text, text, text)])


def test_what_diverges_stands_out():
    example = Example("p", "one two", "one two", "one  tw[o]\nelse", "[o]\nelse")
    assert "> one tw**\\[o\\] else**" in examples_markdown([example])
    assert "> one **two**" in examples_markdown([example._replace(after="one two", diverging="two")])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(examples_table([example]))
    assert "one tw[o] else" in console.export_text()
