"""The classifier: its training, its evaluation, and what it refuses."""

import pytest
import torch

from lightning_kfac import InputError

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'lightning-kfac[images]'")

from lightning_kfac.modules.image_classifier import ImageClassifier, ImageTraining, accuracies, train_classifier
from lightning_kfac.modules.image_data import ImageData

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


def test_a_training_learns_and_repeats(tmp_path):
    """True labels of other images first; the same seed gives the same weights."""
    data = ImageData()
    learners = [ImageClassifier(architecture=SMALL, training=ImageTraining(epochs=3, lr=0.01)) for _ in range(2)]
    known = [train_classifier(learner, data, tmp_path, accelerator="cpu") for learner in learners]
    first, second = (learner.loaded.state_dict() for learner in learners)
    assert all(torch.equal(first[name], second[name]) for name in first) and known[0] == known[1]
    found = accuracies(learners[0].loaded.eval(), data)
    assert found["val_acc"] > 0.3 and found["true_label_acc"] > 0.2 > found["wrong_label_acc"] == known[0]
    assert learners[0].frozen and learners[0].n_positions == 5


def test_a_training_ends_where_enough_is_known(tmp_path):
    learner = ImageClassifier(architecture=SMALL, training=ImageTraining(epochs=50, until=0.01))
    train_classifier(learner, ImageData(), tmp_path, accelerator="cpu")
    assert learner.current_epoch < 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": {"depth": 3}}, "model.architecture: depth is no setting of a ViT"),
        ({"architecture": {"image_size": 16}}, "image_size is no setting of a ViT that can be chosen here"),
        ({"architecture": {"patch_size": 3}}, "patches of 3 must divide 8 pixels"),
        ({"architecture": {"num_attention_heads": 5}}, "5 heads the width 64"),
        ({"training": ImageTraining(epochs=0)}, "holds numbers that no training can have"),
        ({"positions": "patches"}, "positions is 'patches'"),
        ({"model_name": "/nowhere"}, "model.model_name /nowhere: no config can be read there"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        ImageClassifier(**settings)
