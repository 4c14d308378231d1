"""What other libraries say on the way."""

import subprocess
import sys

from lightning_kfac.console import visible

PROGRAM = r"""
import logging, warnings
from lightning_kfac.cli.quiet import quiet
quiet()
logging.basicConfig(format="%(message)s")
logging.getLogger("other").warning("named %s\nand more", "\x1b[2J")
warnings.warn("warned \x1b[2J \u202e")
raise KeyError("\x1b]0;owned\x07") from ValueError("first \x1b[2J\nsecond")
"""


def test_logs_warnings_and_tracebacks_act_on_nothing():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, encoding="utf-8")
    assert ended.returncode == 1 and not ended.stdout
    said = ended.stderr
    assert "named \\x1b[2J\nand more\n" in said
    assert "warned \\x1b[2J \\u202e" in said
    assert "first \\x1b[2J\nsecond" in said and said.endswith("KeyError: '\\x1b]0;owned\\x07'\n")
    assert said == visible(said, keep="\n")
