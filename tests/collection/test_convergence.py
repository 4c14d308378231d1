"""When snapshots are due."""

from lightning_kfac.collection.convergence import Snapshots


def test_snapshots_are_due_at_doublings():
    snapshots = Snapshots(0.5)
    due = [n for n in range(1, 41) if snapshots.due(1000)]
    assert due == [3, 5, 9, 17, 33]  # past 2,048, 4,096, 8,192, 16,384 and 32,768
