"""Upload factors, an edited model or a patch to the Hugging Face hub."""

from jsonargparse import ArgumentParser, Namespace

from lightning_kfac.console import console
from lightning_kfac.storage.hub import push_folder


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--folder", type=str, required=True, help="The factors, the edited model, or the patch.")
    parser.add_argument("--repository", type=str, required=True, help="user/name; made if it does not exist.")
    parser.add_argument("--public", action="store_true", help="Make a new repository public.")


def run(options: Namespace) -> None:
    """Uploads."""
    kind = "public" if options.public else "private"
    console.print(f"upload {options.folder} to {options.repository} (a new repository would be {kind})")
    console.print(f"-> {push_folder(options.folder, options.repository, private=not options.public)}")
