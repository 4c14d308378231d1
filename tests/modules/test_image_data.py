"""The digits and their wrong labels."""

import pytest
import torch

from lightning_kfac import InputError

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'lightning-kfac[images]'")

from lightning_kfac.modules.image_data import ImageData


def test_a_tenth_of_the_training_images_have_wrong_labels():
    data = ImageData()
    differ = data.training.labels != data.training.true
    assert (len(differ), int(differ.sum()), data.n_wrong) == (1437, 144, 144) and differ[:144].all()
    assert torch.equal(data.wrong.labels, data.training.labels[:144])
    assert torch.equal(data.validation.labels, data.validation.true)
    assert data.training.labels.min() == 0 and data.training.labels.max() == 9
    assert (data.training.pixels.min(), data.training.pixels.max()) == (0, 1)


def test_no_image_is_on_both_sides():
    data = ImageData(n_validation=500)
    training = {image.numpy().tobytes() for image in data.training.pixels}
    validation = {image.numpy().tobytes() for image in data.validation.pixels}
    assert len(data.validation.pixels) == 500 and not training & validation


def test_the_seed_draws_all_of_it():
    first, again, other = ImageData(seed=3), ImageData(seed=3), ImageData(seed=4)
    assert torch.equal(first.training.labels, again.training.labels)
    assert torch.equal(first.validation.pixels, again.validation.pixels)
    assert not torch.equal(first.training.labels, other.training.labels)
    assert first.measured() == again.measured() != other.measured()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wrong_labels": 0.0}, "data.wrong_labels is 0.0; it must lie between 0 and 1"),
        ({"n_validation": 1797}, "data.n_validation is 1797, of 1797 images"),
        ({"batch_size": 0}, "data.batch_size is 0; it must be at least 1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        ImageData(**settings)
