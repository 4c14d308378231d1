"""The short help of all commands."""

from lightning_kfac.cli.commands import command_names, summary
from lightning_kfac.console import command_line, filled

# Of the commands that are no module of `commands`: LightningCLI makes them from the Trainer's methods.
TRAINING = {
    "fit": "Collect curvature, and with an edit section edit and evaluate; or train a model.",
    "validate": "Evaluate a model: recitation, answers, perplexity; an edited one beside the model that was edited.",
    "predict": "Look through a corpus for windows that the model recites. --data.mining.help tells how.",
}
WIDTH_OF_NAMES = 13


def overview() -> str:
    """What the program does, and each command in a line or two as wide as the terminal."""
    program = command_line("")
    commands = TRAINING | {name: summary(name) for name in command_names()}
    closing = (
        f"`{program} COMMAND --help` explains the options, `--print_config` shows all of them with their values. Every "
        f"option of a config file can be given on the command line too, as in --edit.rho 0.7; `{program} configs` "
        "lists the config files that come along."
    )
    return "\n".join([
        "Collect the curvature of a language model, edit the model, and measure both.",
        "",
        f"usage: {program} COMMAND [--config CONFIG] [--OPTION VALUE ...]",
        "",
        "commands:",
        *(filled(text, f"  {name:<{WIDTH_OF_NAMES - 2}}") for name, text in commands.items()),
        "",
        filled(closing),
    ])  # fmt: skip
