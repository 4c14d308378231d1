"""Examples as a table and as Markdown."""

import io

from rich.console import Console

from lightning_kfac.reporting.tables import Example, examples_markdown, examples_table


def test_text_with_markup_is_shown_as_it_is():
    text = r"a \[/INST] [bold]b re.sub(r'\[a-z]', x) `*c*` <d>"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(examples_table([Example(text, text, text, text)]))
    assert console.export_text().count(text) == 4
    assert r"\[bold\]b" in examples_markdown([Example(text, text, text, text)])


def test_what_diverges_stands_out():
    example = Example("p", "one two", "one two", "one  tw[o]\nelse", "[o]\nelse")
    assert "> one tw**\\[o\\] else**" in examples_markdown([example])
    assert "> one **two**" in examples_markdown([example._replace(after="one two", diverging="two")])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(examples_table([example]))
    assert "one tw[o] else" in console.export_text()
