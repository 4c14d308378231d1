"""``python -m lightning_kfac`` is the command ``lightning-kfac``."""

from lightning_kfac.cli.main import main

if __name__ == "__main__":
    main()
