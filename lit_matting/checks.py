"""Shape and range checks whose messages a person can act on.

Every public boundary of the package states its tensors as ``("B", 1, "H", "W")`` and checks them here: a check beats a
comment, because it is still true after the code around it has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line uses InputError, and must not wait for torch to print its help
    from torch import Tensor


class InputError(ValueError):
    """A mistake in what the user gave (file, flag, phrase), with the way out in its message.

    The command line prints it as one sentence, without a stack trace; inside Python it is an ordinary ``ValueError``.
    """


def check_shape(
    tensor: Tensor, shape: Sequence[int | str], name: str, sizes: dict[str, int] | None = None
) -> dict[str, int]:
    """Check a tensor against a shape pattern and return the sizes bound to its letters.

    Args:
        tensor: The tensor to check.
        shape: One entry per dimension: an ``int`` must match exactly, a letter binds a size, and the same letter must
            have the same size everywhere it occurs.
        name: How the message calls the tensor.
        sizes: Letters that earlier checks bound; they must hold here too.

    Raises:
        ValueError: If the number of dimensions or a size differs; the message has both shapes.

    Example:
        >>> import torch
        >>> check_shape(torch.zeros(2, 1, 4, 6), ("B", 1, "H", "W"), "alpha")
        {'B': 2, 'H': 4, 'W': 6}
    """
    bound = dict(sizes or {})
    wanted = "(" + ", ".join(str(item) for item in shape) + ")"
    if tensor.ndim != len(shape):
        raise ValueError(f"`{name}` must have shape {wanted}, got {tuple(tensor.shape)} with {tensor.ndim} dimensions.")
    for item, size in zip(shape, tensor.shape):
        expected = item if isinstance(item, int) else bound.setdefault(item, size)
        if expected != size:
            known = ", ".join(f"{letter}={value}" for letter, value in bound.items())
            raise ValueError(
                f"`{name}` must have shape {wanted}{f' with {known}' if known else ''}, got {tuple(tensor.shape)}."
            )
    return bound


def check_range(tensor: Tensor, low: float, high: float, name: str) -> None:
    """Check that a tensor is finite and inside ``[low, high]``.

    Raises:
        ValueError: If a value is outside or not a number; the message has the range found.

    Example:
        >>> import torch
        >>> check_range(torch.tensor([0.0, 1.0]), 0.0, 1.0, "alpha")
    """
    if tensor.numel() == 0:
        return
    smallest, largest = tensor.detach().aminmax()
    # the comparison is written so that NaN fails it
    if not (smallest >= low and largest <= high):
        raise ValueError(
            f"`{name}` must lie in [{low:g}, {high:g}], got values from {smallest.item():g} to {largest.item():g}"
            " (8-bit values need a division by 255)."
        )


def check_prompt(prompt: str, name: str = "prompt") -> str:
    """Return the phrase without surrounding blanks, or say that it has no words.

    Raises:
        InputError: If the phrase holds no letter or digit.

    Example:
        >>> check_prompt("  the red umbrella ")
        'the red umbrella'
    """
    stripped = " ".join(prompt.split())
    if not any(character.isalnum() for character in stripped):
        raise InputError(
            f"`{name}` has no words: got {prompt!r}; name the thing to cut out, for example 'the red umbrella'."
        )
    return stripped
