"""Edit models with saved curvature factors: ``lightning-kfac``, from a clone.

usage: python edit.py COMMAND [--config FILE] [--OPTION VALUE ...]
"""

from lightning_kfac.cli.main import main

if __name__ == "__main__":
    main()
