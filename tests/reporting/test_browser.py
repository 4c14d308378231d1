"""What a person sees: TensorBoard and the report in a browser.

Needs Chromium: `apt-get install -y chromium` on Debian. Without it these tests are skipped. Pages are printed to PDF,
whose text is what is visible, and photographed.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from lightning_kfac.cli.edit import main as edit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install -y chromium")
pypdf = pytest.importorskip("pypdf")


def visit(url: str, folder: Path, name: str, size: str = "1400,1600", ready: int = 20_000) -> tuple[str, Image.Image]:
    """The visible text of a page, without line breaks, and a photograph of it."""
    pdf, png = folder / f"{name}.pdf", folder / f"{name}.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    options += [f"--user-data-dir={folder / 'profile'}", f"--window-size={size}", f"--virtual-time-budget={ready}"]
    for output in (f"--print-to-pdf={pdf}", f"--screenshot={png}"):
        subprocess.run([CHROMIUM, *options, output, url], timeout=100, capture_output=True, check=True)
    text = "\n".join(page.extract_text() for page in pypdf.PdfReader(pdf).pages)
    return "".join(text.split()), Image.open(png)


def is_drawn(photograph: Image.Image) -> bool:
    """Not one colour: something is there."""
    colours = photograph.convert("RGB").getcolors(1 << 24)
    return len(colours) > 50 and max(count for count, _ in colours) < 0.98 * photograph.width * photograph.height


@pytest.fixture(scope="module")
def board(quickstart):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(quickstart[0] / "tensorboard")]
    command += ["--port", str(port), "--host", "127.0.0.1", "--load_fast", "false"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 90
    try:
        while True:
            try:
                tags = urllib.request.urlopen(f"{url}/data/plugin/scalars/tags", timeout=5).read()
                if b"val/edited/strict_acc" in tags:
                    break
            except OSError:
                pass
            if time.monotonic() > deadline:
                pytest.fail("TensorBoard did not start")
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("scalars", ["change/edited", "avg_levenshtein_norm", "extraction.expected_at.10"]),
        ("custom_scalars", ["beforeandafter(0:unedited,1:edited)", "strictaccuracy"]),
        ("text", ["beforeandafter", "unedited", "strictaccuracy"]),
        ("images", ["comparison/metrics", "comparison/lossofheld-outtokens"]),
        ("hparams", ["edit/rho", "edit/blocks", "embedded:train", "[3,4]"]),
    ],
)
def test_tensorboard_shows_the_run(board, tmp_path, page, names):
    text, photograph = visit(f"{board}/#{page}", tmp_path, page)
    if not all(name in text for name in names):  # a busy machine: once more, with patience
        text, photograph = visit(f"{board}/#{page}", tmp_path, page, ready=60_000)
    for name in names:
        assert name in text, text[:2000]
    assert is_drawn(photograph)


def test_report_shows_the_run(quickstart, tmp_path):
    path = tmp_path / "report.html"
    edit(["report", str(quickstart[0]), "--output", str(path)])
    text, photograph = visit(path.as_uri(), tmp_path, "report", "1100,5000", 3000)
    for words in ("Before and after", "strict accuracy", "Not measured", "Reproduce", "no proof of deletion", "3 gate"):
        assert "".join(words.split()) in text
    assert is_drawn(photograph)
    source = path.read_text("utf-8")
    assert "http://" not in source and "https://" not in source and "<script" not in source
    assert source.count("<svg class") >= 8
