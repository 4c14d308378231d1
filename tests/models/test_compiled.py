"""What is compiled between tracked layers. A stand-in for the compiler notes what it is given: compiling takes long."""

import pytest
import torch
from torch import nn

from lightning_kfac import collect_factors, load_factors
from lightning_kfac.cli.train import main as train
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.collection.session import CollectionSession
from lightning_kfac.errors import InputError
from lightning_kfac.models.compiled import check_compiler, compiled_between
from lightning_kfac.models.targets import resolve_targets
from tests.common import build_model, generator, small
from tests.mixtures import build_mixture


@pytest.fixture
def calls(monkeypatch):
    """The modules that ran compiled, in order."""
    ran = []

    def compiler(forward):
        def run(*args, **kwargs):
            ran.append(forward.__self__)
            return forward(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compiler)
    return ran


def names_of(model, modules):
    known = {module: name for name, module in model.named_modules()}
    return [known[module] for module in modules]


def test_the_largest_modules_without_a_tracked_layer_are_compiled(calls):
    model = build_model("llama").requires_grad_(False)
    before = {name: module.forward for name, module in model.named_modules()}
    tracked = list(resolve_targets(model, [1], ["gate", "up"]))
    ids = torch.randint(1, 61, (2, 9), generator=generator())
    wanted = model(input_ids=ids).logits
    with compiled_between(model, tracked):
        assert torch.equal(model(input_ids=ids).logits, wanted)
    names = names_of(model, calls)
    # A block of its own is one; of the tracked block everything but what holds gate and up, and no single product.
    inside = [
        f"model.layers.1.{part}" for part in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp.act_fn")
    ]
    assert names == ["model.rotary_emb", "model.layers.0", *inside, "model.layers.2", "model.norm"]
    assert {name: module.forward for name, module in model.named_modules()} == before


def test_modules_are_put_back_where_the_run_fails(calls):
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="shapes"), compiled_between(model, ["1"]):
        model(torch.ones(1, 3))
    assert calls == [model[0]] and "forward" not in vars(model[0])
    model(torch.ones(1, 2))
    assert len(calls) == 1


def test_experts_of_a_tracked_parameter_run_as_they_are(calls):
    model = build_mixture("olmoe").requires_grad_(False)
    tracked = list(resolve_targets(model, [0], ["expert_up"]))
    with compiled_between(model, tracked):
        model(input_ids=torch.randint(1, 61, (2, 9), generator=generator()))
    names = names_of(model, calls)
    assert "model.layers.0.mlp.experts" not in names and "model.layers.0.mlp" not in names
    assert "model.layers.1" in names


def test_a_collection_is_compiled_after_its_plan(calls):
    """The plan tries the model on rows of another shape, which would be compiled for nothing."""
    model = build_model("llama").requires_grad_(False)
    rows = {"input_ids": torch.randint(1, 61, (2, 9), generator=generator())}
    layers = resolve_targets(model, [1], ["up"])
    session = CollectionSession(model, layers, FisherLoss("gold"), compiled=True)
    session.make_plan((2, 9))
    assert not calls
    session.open(session.plan.passes[0])
    session.run(FisherLoss("gold").prepare(rows)).backward()
    assert "model.layers.0" in names_of(model, calls)
    found = session.close()
    calls.clear()
    wanted = collect_factors(model, [rows], blocks=[1], projections=["up"], labels="gold")
    assert not calls
    assert all(
        torch.equal(found[name].G, wanted[name].G) and torch.equal(found[name].A, wanted[name].A) for name in wanted
    )


def test_containers_are_looked_into(calls):
    """A list of modules has no forward of its own."""
    model = nn.Module()
    model.parts = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Tanh()), nn.Linear(2, 2)])
    with compiled_between(model, []):
        model.parts[1](model.parts[0](torch.ones(1, 2)))
    assert calls == [model.parts[0]]


def test_a_machine_without_a_compiler_is_told_in_one_line(monkeypatch):
    def compiler(function):
        raise RuntimeError("no g++\nand much more")

    monkeypatch.setattr(torch, "compile", compiler)
    check_compiler.cache_clear()
    with pytest.raises(InputError) as error:
        check_compiler("cpu")
    assert "does not work here (no g++); install a C++ compiler" in str(error.value) and "\n" not in str(error.value)
    check_compiler.cache_clear()


def test_fit_compiles_where_asked(calls, tmp_path, capsys):
    check_compiler.cache_clear()
    left_out = dict.fromkeys(("data.heldout", "edit"), "null")
    for name, changes in {"plain": {}, "compiled": {"collect.compile": "true"}}.items():
        train(["fit", *small(tmp_path / name, "null", **left_out, **changes)])
        assert bool(calls) == (name == "compiled")
    assert "compiling before the first batch" in " ".join(capsys.readouterr().err.split())
    plain, compiled = (load_factors(tmp_path / name / "factors") for name in ("plain", "compiled"))
    assert compiled.metadata["compiled"] is True and "compiled" not in plain.metadata
    assert all(torch.equal(compiled[name].G, plain[name].G) for name in plain)
    check_compiler.cache_clear()


def test_no_compiling_of_what_is_spread_over_ranks(calls, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(["fit", *small(tmp_path, "null", **{"collect.compile": "true", "trainer.strategy": "fsdp"})])
    assert "--collect.compile does not work with --trainer.strategy fsdp" in capsys.readouterr().err
