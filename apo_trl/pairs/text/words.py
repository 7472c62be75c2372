"""Words and punctuation marks of a text in any script."""

import regex

__all__ = ["words"]


# Runs of letters, marks, digits and underscores are words, as in scripts that put spaces between them. The others give
# a token for each character with its marks; so does all else that is no space.
_NO_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"


_WORD = regex.compile(rf"[{_NO_SPACES}]\p{{M}}*|(?:(?![{_NO_SPACES}])[\p{{L}}\p{{M}}\p{{N}}_])+|\S")


def words(text: str) -> list[str]:
    """Split a text of any script into words and punctuation marks."""
    found: list[str] = _WORD.findall(text)
    return found
