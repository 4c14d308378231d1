"""What tests of the collection share."""

from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.collect import frozen
from lightning_kfac.collection.engine import CurvatureEngine


def run_engine(model, batch, loss, layers, **settings):
    with frozen(model), CurvatureCapture(layers) as capture:
        last, total = CurvatureEngine(model, capture, loss, **settings).run(loss.prepare(batch))
        last.backward()
        return capture.results(loss.mc_samples), total.item()
