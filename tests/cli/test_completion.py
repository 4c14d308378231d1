"""The completion script, sourced and asked by bash itself."""

import shutil
import subprocess

import pytest

from lightning_kfac.cli.main import main


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(tmp_path, capsys):
    main(["completion", "bash"])
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)

    def completed(*words):
        ask = f'source {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _lightning_kfac; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(
            ["bash", "-c", ask, "bash", "lightning-kfac", *words], capture_output=True, text=True, timeout=20
        )
        return done.stdout.split()

    assert completed("fi") == ["fit"] and set(completed("s")) == {"scan", "sweep"}
    assert "--collect.blocks" in completed("fit", "--collect.b")
    assert completed("apply", "--formu") == ["--formula"]
    assert completed("fit", "--config", "quick") == ["quickstart"]
    main(["completion", "zsh"])
    assert "bashcompinit" in capsys.readouterr().out
