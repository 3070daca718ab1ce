"""The entry point, where rank 1 alone meets a document at its second step that cannot be read."""

import os

from nitp_titan import train
from nitp_titan.errors import UserError

train.import_torchtitan()
from nitp_titan.training.trainer import NITPTrainer  # noqa: E402  (it would import TorchTitan first)

train_step = NITPTrainer.train_step


def step(trainer, data_iterator) -> None:
    if trainer.step == 2 and os.environ["RANK"] == "1":
        raise UserError("part-1.jsonl, line 7: no text.")
    train_step(trainer, data_iterator)


NITPTrainer.train_step = step
train.main()
