"""What is printed is data: no text acts on the terminal."""

import ast
import io
from pathlib import Path

import pytest
from rich.table import Table

import lightning_kfac
from lightning_kfac import console
from lightning_kfac.console import PlainConsole, literal, say, say_error, track_count, visible

PACKAGE = Path(lightning_kfac.__file__).parent
# Escape sequences of terminals (ESC and C1), the bell, bidi overrides, tags, an end of line, half a character, markup.
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202eevil\u2066\U000e0041\r\n\udcff[/evil][bold]x[/] :smile: [link=x]y"
SHOWN = r"\x1b[2J\x1b]0;owned\x07\x9b31m\u202eevil\u2066\U000e0041\r\n\udcff[/evil][bold]x[/] :smile: [link=x]y"
# They print what comes with the package, text that passed `visible`, or JSON that escapes it.
PRINTS = {"console.py", "cli/quiet.py", "cli/main.py", "cli/commands/audit.py", "cli/commands/configs.py",
          "data/demo/planted.py", "data/demo/arithmetic.py"}  # fmt: skip


def test_what_acts_is_shown_and_all_else_stays():
    assert visible(HOSTILE) == SHOWN
    assert visible("a\tb\nc\x1b", keep="\n\t") == "a\tb\nc\\x1b"
    plain = "Straße, 你好, مرحبا, 👩\u200d👩\u200d👧, a\u200cb, [0, 1], \\x1b, $x$, <b>"
    assert visible(plain) == plain
    assert visible(Path("run[v2]x")) == "run[v2]x"


def printed(*objects, width=200):
    file = io.StringIO()
    PlainConsole(file=file, width=width, soft_wrap=True).print(*objects)
    return file.getvalue()


def test_a_console_shows_every_string_as_it_is_on_one_line():
    assert printed(HOSTILE) == SHOWN + "\n"
    assert printed("a\nb", "c") == "a\\nb c\n"


def test_the_same_in_every_part_of_a_table():
    table = Table(title=HOSTILE, caption=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(literal(HOSTILE, "bold"))
    found = printed(table)
    assert found.count(SHOWN) == 5
    assert found == visible(found, keep="\n")


def test_what_is_said_of_progress_and_of_errors(capsys, monkeypatch):
    monkeypatch.setattr(console, "progress_console", PlainConsole(soft_wrap=True, stderr=True))
    say(HOSTILE)
    say_error(HOSTILE)
    assert capsys.readouterr().err == f"{SHOWN}\n" * 2
    file = io.StringIO()
    monkeypatch.setattr(
        console, "progress_console", PlainConsole(file=file, force_terminal=True, width=300, color_system=None)
    )
    with track_count(HOSTILE, "rows", total=2) as advance_to:
        advance_to(1)
    assert SHOWN in file.getvalue()
    assert "owned\x07" not in file.getvalue() and "\u202e" not in file.getvalue()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_prints_past_it(path):
    """Consoles are made in one module; ``print`` and the streams are used where the text is known."""
    tree = ast.parse(path.read_text("utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    prints = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
    streams = any(
        isinstance(call, ast.Attribute) and call.attr == "write" and "sys.std" in ast.unparse(call) for call in calls
    )
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    where = path.relative_to(PACKAGE).as_posix()
    assert where in PRINTS or not (prints or streams)
    assert where == "console.py" or not names & {"Console", "Panel", "rich_print"}
    assert "from_markup" not in path.read_text("utf-8") and "markup=True" not in path.read_text("utf-8")
