"""Prints docs/cli.md, the help of every command: python docs/cli.py > docs/cli.md."""

from typer.main import get_command
from typer.testing import CliRunner

from onnxcam.cli import app


def page() -> str:
    """Return docs/cli.md."""
    parts = ["# The command line\n\nThis is what `--help` prints."]
    for name in ["", *get_command(app).commands]:
        arguments = [*filter(None, [name]), "--help"]
        done = CliRunner().invoke(app, arguments, prog_name="onnxcam", terminal_width=100)
        heading = f"## onnxcam {name}\n\n" if name else ""
        parts.append(f"{heading}```\n{done.output.strip()}\n```")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(page())
