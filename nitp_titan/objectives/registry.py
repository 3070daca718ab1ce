"""The objective that settings name."""

from nitp_titan.objectives.cosine_regularizer import CosineRegularizer
from nitp_titan.objectives.nitp import NITP
from nitp_titan.objectives.objective import Objective
from nitp_titan.objectives.settings import NITPConfig

OBJECTIVES: dict[str, type[Objective]] = {"nitp": NITP, "cosine_regularizer": CosineRegularizer}


def build_objective(settings: NITPConfig) -> Objective:
    """The objective of the `[nitp]` table.

    Raises:
        UserError: if the table names a loss that is not a distance.
    """
    return OBJECTIVES[settings.objective](settings)
