"""Edit models with saved curvature factors; no text is read again for the curvature.

usage: python edit.py COMMAND [--config FILE] [--OPTION VALUE ...]

commands:
  apply      edit a model with saved factors, or apply a patch, and write the result
  sweep      try many edits of one model, and show which are worth it
  inspect    show what is in a factor folder: spectra, and what each rho keeps
  bands      show how strongly texts excite each band of curvature
  scan       edit one block and one projection at a time, and recommend a setting
  report     write a run as one HTML page
  import     convert the factors of another tool
  restore    give the edited layers of a checkpoint their original weights back
  push       upload factors or a patch to the Hugging Face hub
  plan       compute on paper whether a collection fits a machine, and how long it takes

`python edit.py COMMAND --help` explains the options. Factors come from train.py fit: runs/NAME/factors.
"""

import sys

if __name__ == "__main__":
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(__doc__.strip())
        sys.exit()
    from lightning_kfac.cli.edit import main

    main()
