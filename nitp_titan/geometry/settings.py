"""Settings of the geometry that is measured during training. Imports no torch."""

from dataclasses import dataclass

from nitp_titan.errors import invalid


@dataclass(kw_only=True, slots=True)
class GeometryConfig:
    """Geometry of the hidden states during training: effective rank and cosine similarity (Section 5, App. D)."""

    enable: bool = False
    """Measure the last hidden state and, with NITP, the implicit target and the projector's output."""

    interval: int = 100
    """Steps between measurements; the first and the last step are measured too."""

    layers: bool = False
    """Measure the embedding's and every layer's output as well; each needs dim^2 numbers more."""

    num_pairs: int = 1024
    """Token pairs sampled for the cosine similarity of App. D; the closed form over all pairs needs none."""

    validation_batches: int = 1
    """Global batches measured at every validation, the same each time and in every run to compare; 0 measures none."""

    seed: int = 0
    """Seed of the sampled pairs."""

    def __post_init__(self) -> None:
        for key, least in (("interval", 1), ("num_pairs", 1), ("validation_batches", 0), ("seed", 0)):
            if (value := getattr(self, key)) < least:
                raise invalid("geometry", key, value, f"at least {least}")
