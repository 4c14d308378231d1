"""Collect curvature, edit and evaluate: ``python train.py fit --config configs/quickstart.yaml``."""

from lightning_kfac.cli import main

if __name__ == "__main__":
    main()
