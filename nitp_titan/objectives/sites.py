"""Sites: names of the hidden states that are observed. Imports no torch."""

HIDDEN = "hidden"
"""After the final norm: what the unembedding reads."""

TARGET = "target"
"""The implicit token that a position predicts."""

PROJECTED = "projected"
"""The projector's output."""


def layer_site(number: int) -> str:
    """Site of a layer's output, 1 to the number of layers; 0 is the token embedding."""
    return f"layer_{number}"
