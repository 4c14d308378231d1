"""Collect the curvature of a language model, edit the model, and measure both.

usage: python train.py COMMAND --config FILE [--OPTION VALUE ...]

commands:
  fit        collect curvature, and with an `edit` section edit and evaluate (configs/quickstart.yaml)
             or, with a `crystallize` section, study crystallized attention (configs/crystallize.yaml)
             or, with a `model.training` section, train a model (configs/demo_model.yaml)
  validate   evaluate a model: recitation of memorized sets, perplexity
  predict    look through a corpus for windows that the model recites

`python train.py COMMAND --help` explains the options, `--print_config` shows all of them with their
values; every option of a config file can be given on the command line, as in --edit.rho 0.7.
"""

import sys

if __name__ == "__main__":
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(__doc__.strip())
        sys.exit()
    from lightning_kfac.cli.train import main

    main()
