"""The command line: one program, ``lightning-kfac``, and the scripts of a clone that open the same."""
