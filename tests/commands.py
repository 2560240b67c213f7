"""The command line, run inside the test's process."""

from typer.testing import CliRunner

from maskwright.cli.main import app


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def good(*args):
    """The output of a command that must succeed."""
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output
