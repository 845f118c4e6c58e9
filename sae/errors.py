"""The one error that a user can cause."""

_LONGEST = 3000
"""Characters of each of the three parts that are shown."""
_COMMANDS = ("jumpscope", "pip", "wandb")


class UserError(ValueError):
    """Something the user can put right: what must hold, what was found, what to do.

    The command line prints it as one message and exits with code 2; notebooks see a ValueError.
    """

    def __init__(self, must: str, found: str, do: str) -> None:
        super().__init__(f"{_sentence(must)} Found: {_sentence(found)} {_sentence(_capital(do))}")
        self.must, self.found, self.do = must, found, do


def _sentence(text: str) -> str:
    # what a hostile file holds must not keep its own refusal from being shown, nor fill the screen
    text = text.strip().encode("utf-8", "backslashreplace").decode()
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return text if text.endswith((".", "!", "?")) else text + "."


def _capital(text: str) -> str:
    # names of flags, fields and commands keep their case
    word = text.partition(" ")[0]
    plain = word.isalpha() and word.islower() and word not in _COMMANDS
    return text[:1].upper() + text[1:] if plain else text
