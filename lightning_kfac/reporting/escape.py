"""Text as data in pages, Markdown and figures: what is markup there is shown, and acts on nothing."""

import html
import re

from lightning_kfac.console import visible

MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~&!$])")


def as_html(text: object) -> str:
    """As HTML, also within an attribute; line ends and tabs are spaces there.

    Example:
        >>> as_html('<b title="x">\\x1b')
        '&lt;b title=&quot;x&quot;&gt;\\\\x1b'
    """
    return html.escape(visible(text, keep="\n\t"))


def as_markdown(text: object) -> str:
    """As Markdown in one line, also within a table.

    Example:
        >>> print(as_markdown("a|b *c*"))
        a\\|b \\*c\\*
    """
    return MARKDOWN.sub(r"\\\1", visible(text))


def as_label(text: object) -> str:
    """As a title or label of a figure: matplotlib sets what stands between dollars, and hides what begins with ``_``.

    Example:
        >>> print(as_label("$x$"))
        \\$x\\$
    """
    shown = visible(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
