"""Pages on a phone, a tablet and a desk, in light and in dark: laid out by Chromium.

Needs Chromium: `apt-get install -y chromium` on Debian. Without it these tests are skipped.
"""

import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import pytest
from PIL import Image

from lightning_kfac.cli.edit import main as edit
from lightning_kfac.reporting.audit_page import audit_page
from tests.reporting.pages import (
    audit,
    write_abilities,
    write_attacks,
    write_comparison,
    write_scan,
    write_search,
    write_sweep,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install -y chromium")
WIDTHS = (390, 768, 1280)
DARK, LIGHT = 0, 1  # as Chromium's setting counts
# In a frame of each width the page tells how wide it is, what is cut, and its colours.
TELL = """<script>
const root = document.documentElement, box = e => e.getBoundingClientRect();
const open = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, svg, details:not([open])"));
const out = open.filter(e => box(e).width && (box(e).right > innerWidth + 1 || box(e).left < -1));
const keys = [...document.querySelectorAll("td:first-child")].map(e => getComputedStyle(e).position);
const text = document.querySelector("svg text"), style = e => getComputedStyle(e);
const small = [...document.querySelectorAll("svg.drawn text")].map(e => box(e).height).filter(h => h);
parent.postMessage({page: location.pathname.split("/").pop(), width: innerWidth, scroll: root.scrollWidth,
  out: out.map(e => e.outerHTML.slice(0, 80)),
  keys: [...new Set(keys)], paper: style(document.body).backgroundColor, ink: style(document.body).color,
  drawn: text ? style(text).fill : null, smallest: Math.min(...small, 99)}, "*");
</script>"""
FRAMES = """<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><body><script>
const found = []; addEventListener("message", e => { found.push(e.data);
  document.body.dataset.found = encodeURIComponent(JSON.stringify(found)); });
for (const page of %s) for (const width of %s) { const f = document.createElement("iframe");
  f.width = width; f.height = 700; f.src = page; document.body.append(f); }
</script></body>"""


def chromium(folder, mode, *words):
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=5000"]
    options += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={mode}"]
    done = subprocess.run([CHROMIUM, *options, *words], timeout=100, capture_output=True, check=True)
    return done.stdout.decode(errors="replace")


def page_of(write, folder):
    write(folder)
    edit(["report", str(folder)])
    return (folder / "report.html").read_text("utf-8")


WRITERS = [write_comparison, write_sweep, write_scan, write_attacks, write_search, write_abilities]
PAGES = {writer.__name__.removeprefix("write_"): writer for writer in WRITERS}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A folder of pages of every kind."""
    folder = tmp_path_factory.mktemp("pages")
    for name, write in PAGES.items():
        (folder / name).mkdir()
        (folder / f"{name}.html").write_text(page_of(write, folder / name), "utf-8")
    (folder / "audit.html").write_text(audit_page(audit(), []), "utf-8")
    return folder


def laid_out(folder, names, mode):
    """What each page tells of itself at each width."""
    for name in names:
        text = (folder / f"{name}.html").read_text("utf-8")
        (folder / f"{name}-told.html").write_text(text + TELL, "utf-8")
    told = [f"{name}-told.html" for name in names]
    (folder / "frames.html").write_text(FRAMES % (told, list(WIDTHS)), "utf-8")
    dom = chromium(folder, mode, "--dump-dom", (folder / "frames.html").as_uri())
    found = json.loads(unquote(re.search(r'data-found="([^"]+)"', dom)[1]))
    assert sorted((one["page"], one["width"]) for one in found) == [(page, w) for page in sorted(told) for w in WIDTHS]
    return found


@pytest.mark.parametrize("mode", [LIGHT, DARK])
def test_pages_fit_every_width_in_both_modes(pages, mode):
    for found in laid_out(pages, [*PAGES, "audit"], mode):
        assert found["scroll"] <= found["width"] and not found["out"], found
        assert found["keys"] in ([], ["sticky"]), found  # the names of rows stay in sight
        assert (found["paper"] == "rgb(255, 255, 255)") == (mode == LIGHT) and found["ink"] != found["paper"], found
        assert found["drawn"] in (None, found["ink"]), found  # figures have the ink of the page
        assert found["smallest"] >= 7, found


def test_what_sticks_out_is_found(pages):
    """So that the test above can fail."""
    wide = '<p style="width: 600px">wide</p>'
    text = (pages / "search.html").read_text("utf-8")
    (pages / "wide.html").write_text(text.replace("</body>", f"{wide}</body>"), "utf-8")
    for found in laid_out(pages, ["wide"], LIGHT):
        assert bool(found["out"]) == (found["width"] < 600) == (found["scroll"] > found["width"])


def test_a_page_is_drawn_in_both_modes(pages):
    """As a photograph: figures are there, on dark paper and on white."""
    shades = {}
    for mode in (LIGHT, DARK):
        png = pages / f"{mode}.png"
        words = ["--hide-scrollbars", "--window-size=1280,2200", f"--screenshot={png}"]
        chromium(pages, mode, *words, (pages / "comparison.html").as_uri())
        photograph = Image.open(png).convert("RGB")
        colours = sorted(photograph.getcolors(1 << 24), reverse=True)
        shades[mode] = colours[0][1]
        assert len(colours) > 100
        assert colours[0][0] < 0.98 * photograph.width * photograph.height
    assert shades[LIGHT] == (255, 255, 255) and max(shades[DARK]) < 40
