"""Collect the curvature of a language model, edit the model, and measure both: ``lightning-kfac``, from a clone.

usage: python train.py COMMAND [--config FILE] [--OPTION VALUE ...]
"""

from lightning_kfac.cli.main import main

if __name__ == "__main__":
    main()
