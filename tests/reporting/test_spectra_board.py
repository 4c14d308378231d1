"""Spectra in TensorBoard."""

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_kfac.factors.spectra import layer_spectrum
from lightning_kfac.reporting.spectra_board import write_spectra


def test_the_page_of_a_large_layer_is_small(tmp_path):
    """The eigenvalues of a 7B layer: below 1 MB."""
    lambdas, mu = (torch.arange(1, n + 1, dtype=torch.float64) ** -0.7 for n in (11008, 4096))
    name = "model.layers.3.mlp.up_proj"
    with SummaryWriter(str(tmp_path)) as writer:
        write_spectra(writer, {name: layer_spectrum(lambdas, mu, 0.6)})
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 1_000_000
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"spectra/up eigenvalues", "spectra/up mass", "kept/3 up"}
    assert set(events.Tags()["histograms"]) == {"log10 eigenvalues/3 up A", "log10 eigenvalues/3 up G"}
