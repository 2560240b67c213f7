"""The one error class that means "your input": a single clear line, exit code 3 from the command."""


class BadInput(ValueError):
    """Input that cannot be used; the message is one line naming the site, the shape and what was asked."""
