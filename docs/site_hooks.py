"""For mkdocs: files of the repository that pages name become part of the site, so that links work here and on GitHub.

Pages link to each other and to ``../FILE`` of the repository. Markdown files of it become pages, others are copied.
"""

import re
from pathlib import Path
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# What a file of the repository is within the site.
PAGES = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "benchmarks/README.md": "benchmarks.md"}
LINK = re.compile(r"(?<=\]\()([\w./-]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what lies outside ``docs/``."""
    for source, page in PAGES.items():
        if page not in files.src_uris:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            place = placed(target, folder_of(page.src_uri))
            if place.startswith("files/") and place not in files.src_uris:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / place.removeprefix("files/"))))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are within the site, where every page lies in one folder."""
    return LINK.sub(lambda link: placed(link[1], folder_of(page.file.src_uri)), markdown)


def folder_of(page: str) -> str:
    """Where in the repository the source of a page lies."""
    source = next((source for source, name in PAGES.items() if name == page), f"docs/{page}")
    return source.rpartition("/")[0]


def placed(target: str, folder: str) -> str:
    """Where a link that is written in ``folder`` of the repository leads within the site."""
    path = normpath(f"{folder}/{target}") if folder else normpath(target)
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in PAGES:
        return PAGES[path]
    return f"files/{path}" if (ROOT / path).is_file() else target
