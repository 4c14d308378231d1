"""What is printed is data: no text acts on the terminal."""

import ast
import io
import re
from pathlib import Path

import pytest
from rich import box
from rich.table import Column, Table
from rich.text import Text

import lightning_kfac
from lightning_kfac import console
from lightning_kfac.console import PlainConsole, fitted, literal, say, say_error, track_count, visible

PACKAGE = Path(lightning_kfac.__file__).parent
# Escape sequences of terminals (ESC and C1), the bell, bidi overrides, tags, an end of line, half a character, markup.
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202eevil\u2066\U000e0041\r\n\udcff[/evil][bold]x[/] :smile: [link=x]y"
SHOWN = r"\x1b[2J\x1b]0;owned\x07\x9b31m\u202eevil\u2066\U000e0041\r\n\udcff[/evil][bold]x[/] :smile: [link=x]y"
# They print what comes with the package, text that passed `visible`, or JSON that escapes it.
PRINTS = {"console.py", "cli/quiet.py", "cli/main.py", "cli/figures_out.py", "cli/commands/configs.py",
          "cli/commands/completion.py",
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


def wide_table(count):
    table = Table("layer", *(Column(f"figure {n}", no_wrap=True) for n in range(count)), title="Layers", box=box.SIMPLE)
    table.add_row("model.layers.3.mlp.experts.gate_up_proj.7.gate", *count * [Text("0.920 [0.897, 0.940]")])
    return table


def lines_of(tables, width):
    target = PlainConsole(file=io.StringIO(), width=width)
    for table in tables:
        target.print(table)
    return [line.rstrip() for line in target.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_a_table_fits_whole_or_in_parts(width, count):
    """Every figure is there once, no interval is broken, and the names stand in every part."""
    parts = fitted(wide_table(count), width)
    lines = lines_of(parts, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert text.count("0.920") == text.count("[0.897, 0.940]") == count
    assert all(text.count(f"figure {n}") == 1 for n in range(count))
    assert text.count("model.layers.3") == len(parts) == 1 + text.count("(continued)")
    assert len(parts) <= (1 if count <= 2 else 2 if count <= 4 else 4)


def test_what_fits_is_left_alone():
    table = wide_table(2)
    assert fitted(table, 200) == [table]
    assert len(fitted(wide_table(3), 80)) == 1  # with the intervals below their figures


def test_text_is_folded_and_not_split():
    table = Table("", "text")
    table.add_row("prefix", Text("a long line " * 40))
    assert fitted(table, 80) == [table]


def shown_progress(width, description="evaluate unedited model", total=1234567, done=(400_000, 1_234_567)):
    file = io.StringIO()
    terminal = PlainConsole(file=file, force_terminal=True, width=width, color_system=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "progress_console", terminal)
        patch.setattr(console, "format_rate", lambda done, seconds, unit: f"5,841 {unit}/s")
        with track_count(description, "tokens", total=total) as advance_to:
            for number in done:
                advance_to(number)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_progress_stays_on_one_line_and_ends_as_done(width):
    lines = [line.rstrip() for line in shown_progress(width) if line.strip()]
    assert max(map(len, lines)) <= width
    assert all(line.startswith("evaluate unedited model ") for line in lines)
    assert "1,234,567 of 1,234,567 tokens" in lines[-1] and lines[-1].endswith(", done")


def test_progress_of_one_and_of_an_unknown_number():
    assert "1 of 1 token, " in shown_progress(100, total=1, done=(1,))[-1]
    last = shown_progress(100, total=None, done=(7, 9))[-1]
    assert " 9 tokens, " in last and last.rstrip().endswith("done")


def test_progress_in_a_log(capsys, monkeypatch):
    """A block that fails is not done; one that ends before its total says how far it came."""
    monkeypatch.setattr(console, "progress_console", PlainConsole(soft_wrap=True, stderr=True))
    monkeypatch.setattr(console, "SHORTEST_SHOWN", -1.0)
    with track_count("collect", "tokens", total=10) as advance_to:
        advance_to(8)
    with pytest.raises(ValueError), track_count("collect", "tokens", total=10):
        raise ValueError
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("collect: 8 of 10 tokens, ") and lines[0].endswith(", done")


def test_a_legend_is_folded(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    console.show(wide_table(1), ["strict accuracy: share of the sequences that are recited word for word"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("  strict accuracy: share") and all(line.startswith("    ") for line in lines[-2:])
    assert max(map(len, lines)) <= 40
