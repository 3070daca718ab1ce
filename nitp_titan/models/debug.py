"""Debug size of TorchTitan's families: for two CPU cores and the vocabulary of the quickstart's tokenizer."""

import dataclasses

from torchtitan.models.common.decoder import Decoder

DIM = 96
VOCAB_SIZE = 4096


def debug_decoder(config: Decoder.Config, layers: list) -> Decoder.Config:
    """A family's config with other layers, of width `DIM`; initialisation and tying stay the family's own.

    Args:
        config: any flavor of the family.
        layers: configs of its blocks.
    """
    return dataclasses.replace(
        config,
        dim=DIM,
        vocab_size=VOCAB_SIZE,
        tok_embeddings=dataclasses.replace(config.tok_embeddings, num_embeddings=VOCAB_SIZE, embedding_dim=DIM),
        norm=dataclasses.replace(config.norm, normalized_shape=DIM),
        lm_head=dataclasses.replace(config.lm_head, in_features=DIM, out_features=VOCAB_SIZE),
        layers=layers,
    )
