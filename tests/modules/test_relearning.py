"""Relearning: the edited model stays as it is, what is measured is what would be used, and a stop changes nothing."""

import pytest
import torch

from lightning_kfac import InputError
from lightning_kfac.attacks.attack import attacked_layers
from lightning_kfac.attacks.relearning import Relearning
from lightning_kfac.modules.measured_training import Checkpoints, train_and_measure
from lightning_kfac.modules.relearning import RelearningLM
from lightning_kfac.storage.manifest import Manifest
from tests.common import build_model
from tests.mixtures import build_mixture
from tests.modules.test_sequence_training import made

FULL = Relearning(steps=(0, 2, 4), lr=1e-2, batch_size=3)
LORA = Relearning(steps=(0, 2, 4), lr=1e-2, batch_size=3, weights="lora", rank=2)


def outputs(model):
    with torch.no_grad():
        return model(torch.arange(1, 13).view(2, 6)).logits


def run(model, attack, folder, measure=None, steps=None, checkpoints=None):
    """Logits after each number of steps."""
    found = {}

    def note(step, relearned):
        if measure is not None:
            measure(step, relearned)
        found[step] = outputs(relearned)

    module = RelearningLM(model, made(), attack)
    train_and_measure(module, steps or attack.steps, note, folder, "cpu", checkpoints)
    return found, module


@pytest.mark.parametrize("attack", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
def test_the_edited_model_stays_as_it_is_and_zero_steps_are_it(tmp_path, attack, dtype, family):
    model = build_model(family, dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def measure(step, relearned):
        inside = dict(relearned.named_parameters())
        assert attack.weights == "lora" or {p.dtype for p in inside.values()} == {dtype}

    found, module = run(model, attack, tmp_path, measure)
    assert list(found) == [0, 2, 4] and len(module.losses) == 4
    assert torch.equal(found[0], outputs(model)) and not torch.equal(found[2], found[4])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert module.losses[-1] < module.losses[0]
    trained = {p.dtype for p in module.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}


def test_small_steps_are_not_lost_in_narrow_weights(tmp_path):
    """In bfloat16 a step of 1e-5 rounds away; 4 steps of it in float32 do not change less than 2."""
    model = build_model("olmo2", torch.bfloat16)
    _, module = run(model, Relearning(steps=(4,), lr=1e-5, batch_size=3), tmp_path)
    moved = module.model.model.layers[0].mlp.up_proj.weight - model.model.layers[0].mlp.up_proj.weight.float()
    assert (moved != 0).float().mean() > 0.99 and moved.abs().max() < 1e-4


def test_adapters_sit_at_every_layer_but_the_head(tmp_path):
    model = build_model("olmo2")
    module = RelearningLM(model, made(), LORA)
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad}
    reached = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in trained}
    assert reached == set(attacked_layers(model)) and all("lora_" in name for name in trained)
    state = torch.get_rng_state()
    again = dict(RelearningLM(model, made(), LORA).model.named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in module.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("attack", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("stop", [2, 4])
def test_a_stop_changes_nothing(tmp_path, attack, stop):
    Manifest(tmp_path).create("attack")  # what is not listed is not removed
    model = build_model("olmo2")
    whole, module = run(model, attack, tmp_path)
    kept = Checkpoints(tmp_path / "state", "key")

    def kill(step, relearned):
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):  # Lightning makes the one of the other
        run(model, attack, tmp_path, kill, checkpoints=kept)
    left = [step for step in attack.steps if step >= stop]
    assert (kept.before(stop) is not None) == (stop == 4)  # that of step 2
    assert kept.before(2) is None
    rest, second = run(model, attack, tmp_path, steps=left, checkpoints=kept)
    assert list(rest) == left and all(torch.equal(rest[step], whole[step]) for step in left)
    assert second.losses == module.losses[-len(second.losses) :] and len(second.losses) == (2 if stop == 4 else 4)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "record", "lost", "no record"])
def test_a_damaged_checkpoint_is_said_and_not_used(tmp_path, capsys, damage):
    Manifest(tmp_path).create("attack")
    model = build_model("olmo2")
    kept = Checkpoints(tmp_path / "state", "key")
    whole, _ = run(model, FULL, tmp_path)

    def kill(step, relearned):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(model, FULL, tmp_path, kill, checkpoints=kept)
    path = kept.before(4)
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    if damage in ("flip", "cut"):
        path.write_bytes(contents if damage == "flip" else contents[:-100])
    elif damage == "record":
        path.with_suffix(".json").write_text('{"step": 2}')
    else:
        (path if damage == "lost" else path.with_suffix(".json")).unlink()
    assert kept.before(4) is None
    assert ("damaged; the relearning begins again" in capsys.readouterr().err) == (damage != "no record")
    rest, _ = run(model, FULL, tmp_path, steps=[4], checkpoints=kept)
    assert torch.equal(rest[4], whole[4]) and not (tmp_path / "state").exists()


def test_nothing_is_trained_for_no_steps(tmp_path):
    model = build_model("olmo2")
    found, module = run(model, Relearning(steps=(0,)), tmp_path)
    assert torch.equal(found[0], outputs(model)) and not module.losses


def test_what_cannot_relearn_is_refused(monkeypatch):
    monkeypatch.setattr("lightning_kfac.models.adapters.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"weights lora needs peft: pip install 'lightning-kfac\[peft\]'"):
        RelearningLM(build_model("olmo2"), made(), LORA)
    packed = build_model("olmo2")
    weight = torch.zeros(40, 24, dtype=torch.int8)
    packed.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(InputError, match="without quantization"):
        RelearningLM(packed, made(), FULL)


def test_all_weights_of_experts_are_trained(tmp_path):
    model = build_mixture("olmoe")
    _, module = run(model, FULL, tmp_path)
    before = model.model.layers[0].mlp.experts.down_proj
    assert not torch.equal(module.model.model.layers[0].mlp.experts.down_proj, before)
